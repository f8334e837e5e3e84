"use strict";
// Numbers of charts on hover and by keyboard; the part of the page that is read, in the contents.
(() => {
  const tip = document.getElementById("tip");
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("class", "ring"); ring.setAttribute("r", "7");
  let at = -1, chart = null;

  const points = (svg) => svg._points || (svg._points = JSON.parse(svg.dataset.hover || "[]"));

  function hide() { tip.hidden = true; ring.remove(); at = -1; }

  function show(svg, index) {
    const [x, y, text] = points(svg)[index];
    at = index; chart = svg;
    ring.setAttribute("cx", x); ring.setAttribute("cy", y); svg.append(ring);
    tip.textContent = text; tip.hidden = false;
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const left = box.left + x * scale, top = box.top + y * scale, own = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(left - own.width / 2, innerWidth - own.width - 4)) + "px";
    tip.style.top = (top - own.height - 12 > 0 ? top - own.height - 12 : top + 14) + "px";
  }

  function nearest(svg, event) {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = -1, least = 40 * 40;
    points(svg).forEach((each, index) => {
      const far = (each[0] - x) ** 2 + (each[1] - y) ** 2;
      if (far < least) { least = far; best = index; }
    });
    return best;
  }

  document.addEventListener("pointermove", (event) => {
    const svg = event.target.closest ? event.target.closest("svg[data-hover]") : null;
    const index = svg ? nearest(svg, event) : -1;
    if (index >= 0) show(svg, index); else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => {
    const drawn = document.activeElement;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !drawn || !drawn.classList.contains("drawn")) return;
    const svg = drawn.querySelector("svg[data-hover]"), n = points(svg).length;
    if (!n) return;
    event.preventDefault();
    show(svg, chart === svg && at >= 0 ? (at + step + n) % n : step > 0 ? 0 : n - 1);
  });

  const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
  const contents = document.querySelector(".contents details");
  if (innerWidth < 700) contents.open = false;
  const seen = new IntersectionObserver((entries) => {
    for (const each of entries) if (each.isIntersecting) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(each.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const id of links.keys()) seen.observe(document.getElementById(id));
})();
