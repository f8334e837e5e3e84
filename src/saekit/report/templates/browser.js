// The latents: a list of which only the rows in sight are elements, and the card of one. Text enters by textContent alone.
(() => {
  const root = document.getElementById("browser"), form = root.querySelector(".tools"), list = root.querySelector(".list");
  const space = root.querySelector(".space"), card = root.querySelector(".card"), status = root.querySelector(".status");
  const saes = JSON.parse(document.getElementById("latents-data").textContent);
  const HEIGHT = 56, waiting = {};
  let sae = 0, index = null, shown = [], chosen = -1, rows = new Map();

  // ------------------------------------------------------------------------------------------------ data
  async function unpack(text) {
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  window.__cards = (key, text) => waiting[key](text);

  function chunk(number, at) {
    const own = saes[number], kept = own.kept || (own.kept = {});
    if (!kept[at]) {
      const source = own.chunks[at];
      const text = source.startsWith("data:") ? Promise.resolve(source.slice(5)) : new Promise((done, failed) => {
        waiting[`${number}-${at}`] = done;
        const script = document.createElement("script");
        script.src = source;
        script.onerror = () => failed(new Error(`The cards of these latents stand in ${source}, which is not here: the page was moved without its folder. Put the folder next to it again.`));
        document.head.append(script);
      });
      kept[at] = text.then(unpack);
      kept[at].catch(() => { delete kept[at]; });
    }
    return kept[at];
  }

  async function cardOf(place) {
    const at = Math.floor(place / index.per), part = await chunk(sae, at);
    return { own: part.cards[place - at * index.per], tokens: part.tokens };
  }

  // ------------------------------------------------------------------------------------------------ text
  const MARKS = { "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡" };
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

  function clean(text, longest = 400) {
    const whole = String(text), most = whole.length > longest ? whole.slice(0, longest) : whole;
    const safe = most.toWellFormed ? most.toWellFormed() : most;
    const seen = safe.replace(HIDDEN, (sign) => {
      const code = sign.charCodeAt(0);
      return MARKS[sign] || (code < 32 ? String.fromCharCode(0x2400 + code) : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`);
    });
    return whole.length > longest ? `${seen}… (${whole.length.toLocaleString("en")} characters)` : seen;
  }

  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child instanceof Node ? child : String(child));
    return element;
  }

  // A label that is a list of tokens: each stands in a box, so that spaces are seen.
  function named(text, longest = 120) {
    const before = /^[a-z ]*(?=`)/.exec(text)?.[0] || "", parts = text.slice(before.length).split(" · ");
    if (!text || !parts.every((each) => /^`[^]*`$/.test(each))) return words(text || "no label", longest);
    return h("span", null, before, parts.flatMap((each) => [h("bdi", { class: "tok" }, clean(each.slice(1, -1), longest)), " "]));
  }

  const words = (text, longest) => h("bdi", null, clean(text, longest));
  // The digits of saekit.measure.numbers: three that count, a tie to the even one, thousands separated.
  function decimals(value) {
    const sign = value < 0 ? "−" : "", size = Math.abs(value), near = Math.round(size);
    if (size >= 999.5) return sign + (near - size === 0.5 && near % 2 ? near - 1 : near).toLocaleString("en");
    const [digits, power] = size.toExponential(60).split("e"), exact = digits.replace(".", "");
    const tie = /^50*$/.test(exact.slice(3)) && Number(exact[2]) % 2 === 0;
    const text = tie ? `${digits.slice(0, 4)}e${power}` : size.toExponential(2);
    if (!size || Number(text) >= 1e-4) return (size ? sign : "") + String(Number(text));
    const [front, tail] = text.split("e-");
    return `${sign}${Number(front)}e-${tail.padStart(2, "0")}`;
  }
  const percent = (value) => `${decimals(100 * value)}%`;
  const PERCENT = new Set(["density", "detection_percentile", "purity_percentile", "stability"]);
  const number = (key, value) => (value === null || value === undefined ? "unknown" : PERCENT.has(key) ? percent(value) : decimals(value));
  const column = (key) => index.columns.find((each) => each.k === key);
  const value = (key, place) => { const found = column(key); return found ? found.v[place] : null; };

  // ------------------------------------------------------------------------------------------------ the list
  function found() {
    const query = form.find.value.trim().toLowerCase(), id = /^[#f]*(\d+)$/.exec(query);
    const density = form.density.value, sharing = form.sharing.value, picked = form.chosen.value, told = form.told.value;
    const keep = [];
    for (let place = 0; place < index.ids.length; place++) {
      if (query && !(id && index.ids[place] === Number(id[1])) && !index.labels[place].toLowerCase().includes(query) && !index.peaks[place].some((token) => token.toLowerCase().includes(query))) continue;
      const often = value("density", place), others = value("found_in", place), above = value("detection_percentile", place);
      if (density === "rare" && !(often < 0.001)) continue;
      if (density === "middle" && !(often >= 0.001 && often <= 0.1)) continue;
      if (density === "dense" && !(often > 0.1)) continue;
      if (sharing && (others === null || (others > 1) !== (sharing === "shared"))) continue;
      if (picked && !index.classes[picked].includes(index.ids[place])) continue;
      if (told && (above !== null && above >= 0.95) !== (told === "told")) continue;
      keep.push(place);
    }
    const key = form.sort.value, sign = Number(form.order.value);
    const of = key === "latent" ? (place) => index.ids[place] : (place) => value(key, place);
    if (key === "label") keep.sort((a, b) => -sign * index.labels[a].localeCompare(index.labels[b]) || a - b);
    else keep.sort((a, b) => {
      const one = of(a), other = of(b);
      if (one === null || other === null) return (one === null) - (other === null) || a - b;
      return sign * (one - other) || a - b;
    });
    if (id) keep.sort((a, b) => (index.ids[b] === Number(id[1])) - (index.ids[a] === Number(id[1])));
    return keep;
  }

  function refresh() {
    shown = found();
    space.style.height = `${shown.length * HEIGHT}px`;
    list.setAttribute("aria-rowcount", shown.length);
    const of = index.of > index.ids.length ? ` with a card (the SAE has ${index.of.toLocaleString("en")})` : "";
    status.textContent = shown.length === index.ids.length ? `${shown.length.toLocaleString("en")} latents${of}` : `${shown.length.toLocaleString("en")} of ${index.ids.length.toLocaleString("en")} latents${of}`;
    for (const row of rows.values()) row.remove();
    rows.clear();
    list.scrollTop = 0;
    draw();
  }

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4), last = Math.min(shown.length, first + Math.ceil((list.clientHeight || 600) / HEIGHT) + 9);
    for (const [at, row] of rows) if (at < first || at >= last) { row.remove(); rows.delete(at); }
    for (let at = first; at < last; at++) if (!rows.has(at)) {
      const row = rowOf(at, shown[at]);
      rows.set(at, row);
      list.append(row);
    }
    for (const [at, row] of rows) row.setAttribute("aria-selected", shown[at] === chosen);
    const now = shown.indexOf(chosen);
    if (rows.has(now)) list.setAttribute("aria-activedescendant", `row${now}`); else list.removeAttribute("aria-activedescendant");
  }

  function rowOf(at, place) {
    const key = form.sort.value, about = [];
    if (column(key)) about.push(`${column(key).n} ${number(key, value(key, place))}`);
    if (key !== "detection" && value("detection", place) !== null && (column(key)?.n.length || 0) <= 12) about.push(`label AUC ${number("", value("detection", place))}`);
    if (key === "detection" || !column(key)) about.push(`density ${number("density", value("density", place))}`);
    if (value("found_in", place) !== null && (key === "detection" || key === "density" || !column(key))) about.push(`${value("found_in", place)}/${index.seeds} SAEs`);
    const row = h("div", { class: "row", role: "row", id: `row${at}`, "aria-rowindex": at + 1, style: `top:${at * HEIGHT}px` },
      h("div", { role: "gridcell" }, h("span", { class: "id" }, `#${index.ids[place]}`), named(index.labels[place])),
      h("div", { class: "about", role: "gridcell" }, about.join(" · ")));
    row.addEventListener("click", () => { go(place); });
    return row;
  }

  // ------------------------------------------------------------------------------------------------ moving
  const address = (place) => `#f${index.ids[place]}${sae ? `-${sae}` : ""}`;

  function go(place, replace) {
    if (location.hash === address(place)) return open(place);
    if (replace) history.replaceState(null, "", address(place)); else history.pushState(null, "", address(place));
    return open(place);
  }

  async function open(place) {
    chosen = place;
    root.classList.add("opened");
    const at = shown.indexOf(place);
    if (at >= 0) {
      const top = at * HEIGHT;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
    }
    draw();
    try {
      const { own, tokens } = await cardOf(place);
      if (chosen === place) { card.replaceChildren(...cardParts(place, own, tokens)); card.scrollTop = 0; }
    } catch (error) {
      card.replaceChildren(h("p", { class: "missing" }, error.message));
    }
  }

  async function follow() {
    const asked = /^#f(\d+)(?:-(\d+))?$/.exec(location.hash);
    if (!asked) { root.classList.remove("opened"); return; }
    const wanted = Number(asked[2] || 0);
    if (wanted !== sae && wanted < saes.length) await pick(wanted);
    const place = index.ids.indexOf(Number(asked[1]));
    if (place < 0) card.replaceChildren(h("p", { class: "missing" }, `There is no card of latent ${asked[1]} on this page.`));
    else {
      if (!shown.includes(place)) { form.reset(); if (form.sae) form.sae.value = sae; refresh(); }
      await open(place);
    }
    root.scrollIntoView({ block: "start", behavior: "instant" });
  }

  async function pick(number) {
    sae = number;
    index = await (saes[number].read || (saes[number].read = unpack(saes[number].index)));
    if (form.sae) form.sae.value = number;
    const kept = form.sort.value;
    form.sort.replaceChildren(...[["latent", "number"], ["label", "label"], ...index.columns.map((each) => [each.k, each.n])].map(([key, name]) => h("option", { value: key }, name)));
    form.sort.value = kept && column(kept) ? kept : column("detection") ? "detection" : "latent";
    form.sharing.parentNode.hidden = !column("found_in");
    form.chosen.parentNode.hidden = !Object.keys(index.classes || {}).length;
    form.chosen.replaceChildren(h("option", { value: "" }, "any"), ...Object.keys(index.classes || {}).map((name) => h("option", { value: name }, clean(name, 60))));
    refresh();
  }

  // ------------------------------------------------------------------------------------------------ the card
  function cardParts(place, own, tokens) {
    const id = index.ids[place], more = own.more;
    const back = h("button", { class: "back", type: "button" }, "← All latents");
    back.addEventListener("click", () => { history.pushState(null, "", "#browser"); follow(); });
    const parts = [back, h("header", null, h("h3", null, named(index.labels[place], 400)), h("a", { href: address(place) }, `latent ${id}`))];
    parts.push(badges(place, more), facts(place));
    parts.push(...contexts(own, tokens));
    parts.push(h("div", { class: "two" }, histogram(own), ...positions(more), neighbours(own, more), ...written(more), ...shares(more)));
    parts.push(...clusters(more), ...inOthers(place, own), ...effect(own), ...scores(more), ...others(more), ...doubts(place, more));
    return parts.filter(Boolean);
  }

  function badges(place, more) {
    const found = [], often = value("density", place), above = value("detection_percentile", place), others = value("found_in", place);
    if (others !== null) found.push([others > 1 ? `shared: in ${others} of ${index.seeds} SAEs` : index.seeds === 2 ? "orphan: not in the other SAE" : `orphan: in none of the ${index.seeds - 1} other SAEs`, others > 1 ? "good" : "bad"]);
    if (often > 0.1) found.push(["dense", "bad"]);
    if (above !== null) found.push(above >= 0.95 ? [`label above ${percent(above)} of shuffled`, "good"] : ["weak label", "bad"]);
    if (more.polysemantic) found.push(["contexts fall apart", "bad"]);
    if (more.label_kind && more.label_kind !== "token") found.push([`label: ${more.label_kind}`, ""]);
    return found.length ? h("ul", { class: "badges" }, found.map(([text, tone]) => h("li", { class: tone }, text))) : null;
  }

  const facts = (place) => h("dl", { class: "facts" }, index.columns.filter((each) => each.v[place] !== null && !each.k.startsWith("scores.")).map((each) =>
    h("div", { title: each.a }, h("dt", null, each.n), h("dd", null, number(each.k, each.v[place])))));

  function contexts(own, tokens) {
    const most = Math.max(...own.top.map((each) => peakOf(each)), ...own.sample.map((each) => peakOf(each)), 1e-9), parts = [];
    const legend = () => h("p", { class: "legend" }, "Code, of the largest shown:", h("span", { class: "t1" }, "below ⅓"), h("span", { class: "t2" }, "⅓ to ⅔"), h("span", { class: "t3" }, "above ⅔"));
    if (own.top.length) parts.push(h("h4", null, "Where it fires most"), legend(), ...own.top.map((each) => context(each, tokens, most)));
    if (own.sample.length) parts.push(h("h4", null, "Where it fires at all: a sample"), ...own.sample.map((each) => context(each, tokens, most)));
    return parts;
  }

  const peakOf = (example) => Math.abs((example[3].find(([at]) => at === example[1]) || [0, 0])[1]);

  function context([document_, peak, ids, codes, quantile], tokens, most) {
    const code = new Map(codes), line = h("p", { dir: "auto" });
    ids.forEach((token, at) => {
      const strength = Math.abs(code.get(at) || 0) / most, shade = !code.has(at) ? "" : strength > 2 / 3 ? "t3" : strength > 1 / 3 ? "t2" : "t1";
      const piece = words(tokens[token]);
      if (!shade) return line.append(piece);
      line.append(h("span", { class: at === peak ? `${shade} peak` : shade, title: `code ${decimals(code.get(at))}, document ${document_}` }, piece));
    });
    return h("div", { class: "context" }, h("span", { class: "code", title: quantile === undefined ? `document ${document_}` : `larger than ${percent(quantile)} of its codes` }, decimals(code.get(peak) || 0)), line);
  }

  function svg(width, height, label) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    element.setAttribute("viewBox", `0 0 ${width} ${height}`); element.setAttribute("role", "img"); element.setAttribute("aria-label", label);
    element.put = (tag, attributes, text) => {
      const child = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, each] of Object.entries(attributes)) child.setAttribute(name, each);
      if (text !== undefined) child.textContent = text;
      element.append(child);
    };
    element.hover = [];
    return element;
  }

  function drawn(element) {
    element.dataset.hover = JSON.stringify(element.hover);
    return h("div", { class: "drawn", tabindex: 0, role: "group", "aria-label": element.getAttribute("aria-label") }, element);
  }

  function histogram(own) {
    if (own.histogram.length < 2) return null;
    const bins = own.histogram, most = Math.max(...bins.map((each) => each[1])), low = Math.log2(bins[0][0]), high = Math.log2(bins.at(-1)[0]) + 0.25;
    const picture = svg(320, 120, "How many of its codes have which size"), x = (log) => 6 + ((log - low) / (high - low)) * 308;
    for (const [edge, count] of bins) {
      const left = x(Math.log2(edge)), wide = x(Math.log2(edge) + 0.25) - left, tall = (count / most) * 88;
      picture.put("rect", { x: left.toFixed(1), y: (96 - tall).toFixed(1), width: Math.max(1, wide - 1).toFixed(1), height: Math.max(0.7, tall).toFixed(1), fill: "currentColor", class: "c0" });
      picture.hover.push([left + wide / 2, 96 - tall, `codes ${decimals(edge)} to ${decimals(edge * 2 ** 0.25)}: ${count.toLocaleString("en")}`]);
    }
    for (const [at, anchor] of [[bins[0][0], "start"], [bins.at(-1)[0] * 2 ** 0.25, "end"]]) picture.put("text", { x: anchor === "start" ? 6 : 314, y: 113, "text-anchor": anchor, fill: "currentColor" }, decimals(at));
    return h("div", null, h("h4", null, "Sizes of its codes"), drawn(picture));
  }

  const link = (id) => { const place = index.ids.indexOf(id); return place < 0 ? `#${id}` : h("a", { href: address(place) }, `#${id}`, " ", named(index.labels[place], 40)); };
  const chips = (items) => h("ul", { class: "chips" }, items.map(([content, note]) => h("li", null, content, note === undefined ? null : h("small", null, note))));

  function neighbours(own, more) {
    const parts = [];
    if (own.neighbours.length) parts.push(h("h4", null, "Nearest decoder directions"), chips(own.neighbours.map(([id, cosine]) => [link(id), `cosine ${decimals(cosine)}`])));
    if (more.coactive && more.coactive.length) parts.push(h("h4", null, "Fire on the same tokens"), chips(more.coactive.map((each) => [link(each.latent), `Jaccard ${decimals(each.jaccard)}`])));
    return parts.length ? h("div", null, parts) : null;
  }

  function written(more) {
    const parts = [], agreement = index.logits && index.logits.agreement && index.logits.agreement.value;
    for (const [key, title] of [["promoted", "Raises the logits of"], ["suppressed", "Lowers the logits of"]])
      if (Array.isArray(more[key]) && more[key].length) parts.push(h("div", null, h("h4", null, title), chips(more[key].map((each) => [words(each.token, 40), decimals(each.value)])),
        agreement ? h("p", { class: "soft" }, `Agreement of such lists with ablation: ${decimals(agreement)} (rank correlation).`) : null));
    return parts;
  }

  function shares(more) {
    const parts = [];
    for (const [key, title] of [["tokens", "Tokens it fires on"], ["previous", "After the tokens"], ["next", "Before the tokens"]])
      if (Array.isArray(more[key]) && more[key].length) parts.push(h("div", null, h("h4", null, title), chips(more[key].slice(0, 8).map((each) => [words(each.token, 40), `${percent(each.share)} of it`]))));
    return parts;
  }

  function positions(more) {
    if (!Array.isArray(more.positions) || more.positions.length < 2) return [];
    const most = Math.max(...more.positions.map((each) => each[1])) || 1, wide = 308 / more.positions.length;
    const picture = svg(320, 100, "How often it fires at which position of a text");
    more.positions.forEach(([first, rate], at) => {
      const tall = (rate / most) * 70, left = 6 + at * wide;
      picture.put("rect", { x: left.toFixed(1), y: (78 - tall).toFixed(1), width: Math.max(1, wide - 1.5).toFixed(1), height: Math.max(0.7, tall).toFixed(1), fill: "currentColor", class: "c0" });
      if (at % Math.ceil(more.positions.length / 6) === 0) picture.put("text", { x: (left + wide / 2).toFixed(1), y: 95, "text-anchor": "middle", fill: "currentColor" }, String(first));
      picture.hover.push([left + wide / 2, 78 - tall, `from position ${first}: ${percent(rate)} of tokens`]);
    });
    return [h("div", null, h("h4", null, "Position in the text"), drawn(picture))];
  }

  function clusters(more) {
    if (!Array.isArray(more.clusters) || more.clusters.length < 2) return [];
    return [h("h4", null, "Kinds of contexts"), ...more.clusters.map((each) => h("div", null, h("p", { class: "soft" }, `${percent(each.fraction)} of its firings`), chips([...each.tokens, ...(each.context || [])].slice(0, 12).map((token) => [words(token, 40)]))))];
  }

  function inOthers(place, own) {
    const parts = [];
    if (own.judged && own.judged !== index.labels[place]) parts.push(h("h4", null, "Label that a language model tested"), h("p", null, words(own.judged)));
    if (own.selected) parts.push(h("h4", null, "Selected by classifiers"), chips(own.selected.map(([task, arm, rank]) => [words(`${task}: ${arm}`, 80), `rank ${rank}`])));
    if (own.weights) parts.push(h("h4", null, "Weight by class"), chips(own.weights.map(([name, weight]) => [words(name, 60), (weight > 0 ? "+" : "") + decimals(weight)])));
    return parts;
  }

  function effect(own) {
    const each = own.effect;
    if (!each) return [];
    if (each.reason) return [h("h4", null, "What it does"), h("p", null, `Not tested: ${clean(each.reason)}.`)];
    const parts = [h("h4", null, "What it does"), h("p", null, `Ablated where it fires, the next-token distribution changes by ${measured(each.kl)} nats (KL). Verdict: ${clean(each.verdict)}.`)];
    const kinds = Object.entries(each.kl_null || {}).filter(([, values]) => values.length);
    if (kinds.length) {
      const all = [each.kl.value, each.kl.high, each.kl.low, ...kinds.flatMap(([, values]) => values)].filter((v) => v !== null), most = Math.max(...all) * 1.05 || 1;
      const picture = svg(420, 34 + 24 * kinds.length + 16, "Effect of the latent and of controls of the same size"), x = (v) => 110 + (v / most) * 300;
      const row = (y, name) => picture.put("text", { x: 0, y: y + 4, fill: "currentColor" }, name);
      row(16, "this latent");
      if (each.kl.low !== null) picture.put("path", { d: `M${x(each.kl.low)} 16H${x(each.kl.high)}`, stroke: "currentColor", "stroke-width": 5, opacity: 0.4, class: "c0", "stroke-linecap": "round" });
      picture.put("circle", { cx: x(each.kl.value), cy: 16, r: 5, fill: "currentColor", class: "c0" });
      picture.hover.push([x(each.kl.value), 16, `this latent: ${measured(each.kl)} nats`]);
      kinds.forEach(([name, values], at) => {
        const y = 40 + 24 * at;
        row(y, name === "latents" ? "other latents" : name === "directions" ? "directions" : clean(name, 16));
        values.forEach((v) => { picture.put("circle", { cx: x(v).toFixed(1), cy: y, r: 3.5, fill: "currentColor", opacity: 0.5, class: "cm" }); picture.hover.push([x(v), y, `control: ${decimals(v)} nats`]); });
      });
      picture.put("text", { x: 410, y: 34 + 24 * kinds.length + 10, "text-anchor": "end", fill: "currentColor", opacity: 0.7 }, "KL (nats)");
      parts.push(h("figure", { class: "chart" }, drawn(picture)));
    }
    if (each.followers && each.followers.length) parts.push(h("p", { class: "soft" }, "Followed in the labelling half by:"), chips(each.followers.map((token) => [words(token, 40)])));
    if (each.doses && each.doses.length) parts.push(doses(each.doses));
    return parts;
  }

  const measured = (each) => each.text;

  function doses(found) {
    const picture = svg(420, 170, "Rise of the tokens that follow it, by dose"), top = Math.max(...found.flatMap((d) => [d.rise.high ?? d.rise.value, d.rise_null_95 ?? 0])), low = Math.min(0, ...found.map((d) => d.rise.low ?? d.rise.value));
    const most = Math.max(...found.map((d) => d.dose)), x = (d) => 40 + (d / most) * 360, y = (v) => 140 - ((v - low) / (top - low || 1)) * 125;
    const band = found.filter((d) => d.rise_null_95 !== null && d.rise_null_95 !== undefined);
    if (band.length) picture.put("path", { d: `M${x(band[0].dose)} ${y(low)}` + band.map((d) => `L${x(d.dose)} ${y(d.rise_null_95)}`).join("") + `L${x(band.at(-1).dose)} ${y(low)}Z`, fill: "currentColor", opacity: 0.2, class: "cm" });
    picture.put("path", { d: found.map((d, at) => `${at ? "L" : "M"}${x(d.dose)} ${y(d.rise.value)}`).join(""), fill: "none", stroke: "currentColor", "stroke-width": 2, class: "c0" });
    for (const d of found) {
      if (d.rise.low !== null) picture.put("path", { d: `M${x(d.dose)} ${y(d.rise.low)}V${y(d.rise.high)}`, stroke: "currentColor", "stroke-width": 4, opacity: 0.4, class: "c0" });
      picture.put("circle", { cx: x(d.dose), cy: y(d.rise.value), r: 4, fill: "currentColor", class: "c0" });
      picture.hover.push([x(d.dose), y(d.rise.value), `dose ${d.dose}: ${measured(d.rise)} nats; 95% of the controls below ${decimals(d.rise_null_95)}`]);
      picture.put("text", { x: x(d.dose), y: 158, "text-anchor": "middle", fill: "currentColor" }, String(d.dose));
    }
    picture.put("path", { d: `M40 ${y(0)}H400`, stroke: "currentColor", opacity: 0.4 });
    picture.put("text", { x: 34, y: y(0) + 4, "text-anchor": "end", fill: "currentColor" }, "0");
    picture.put("text", { x: 34, y: y(top) + 4, "text-anchor": "end", fill: "currentColor" }, decimals(top));
    return h("figure", { class: "chart" }, drawn(picture), h("figcaption", null, "Added where it does not fire: rise of the log-probability of its followers (nats) by dose, in 99th percentiles of its codes. Grey: below 95% of the controls."));
  }

  function scores(more) {
    const names = Object.keys(more.scores || {});
    if (!names.length) return [];
    const controls = [...new Set(names.flatMap((name) => Object.keys((more.percentiles || {})[name] || {})))];
    const cell = (v) => h("td", { class: "number" }, v === undefined || v === null ? "" : percent(v));
    return [h("h4", null, "Scores, and the part of each control’s latents that score worse"), h("div", { class: "scores" }, h("table", null,
      h("thead", null, h("tr", null, h("th", null, ""), h("th", { class: "number" }, "score"), controls.map((name) => h("th", { class: "number" }, words(name, 20))))),
      h("tbody", null, names.filter((name) => more.scores[name] !== null).map((name) => h("tr", null, h("th", { scope: "row" }, name.replaceAll("_", " ")), h("td", { class: "number" }, decimals(more.scores[name])),
        controls.map((control) => cell(((more.percentiles || {})[name] || {})[control])))))))];
  }

  const KNOWN = new Set(["promoted", "suppressed", "tokens", "previous", "next", "positions", "coactive", "clusters", "polysemantic", "label_kind", "scores", "percentiles"]);

  // What a newer explanation adds is shown as it stands.
  function others(more) {
    const rest = Object.entries(more).filter(([key, each]) => !KNOWN.has(key) && typeof each !== "number");
    return rest.flatMap(([key, each]) => [h("h4", null, key.replaceAll("_", " ")), Array.isArray(each) ? chips(each.slice(0, 20).map((item) => [words(typeof item === "object" ? JSON.stringify(item) : item, 80)])) : h("p", null, words(typeof each === "object" ? JSON.stringify(each) : each))]);
  }

  function doubts(place, more) {
    const found = [], above = value("detection_percentile", place), auc = value("detection", place), often = value("density", place);
    if (auc === null) found.push("Its label has no score: it fires in too few of the held-out documents.");
    else if (above === null || above < 0.95) found.push("Shuffled latents have labels that hold as well as this one: it may be chance.");
    else if (auc < 0.7) found.push(`The label tells little: an AUC of ${decimals(auc)}, where 0.5 is chance.`);
    if (often > 0.1) found.push("It fires on more than a tenth of all tokens: no short label fits.");
    if (value("found_in", place) === 1) found.push("No other seed found it.");
    if (more.polysemantic) found.push("Its contexts fall apart into kinds: one label cannot fit them all.");
    found.push("Firing coherently is not meaning: latents of a frozen decoder do so too.");
    return [h("h4", null, "Why this may be wrong"), h("ul", { class: "why" }, found.map((each) => h("li", null, each)))];
  }

  // ------------------------------------------------------------------------------------------------ events
  form.addEventListener("input", () => { if (form.sae && Number(form.sae.value) !== sae) pick(Number(form.sae.value)); else refresh(); });
  form.addEventListener("submit", (event) => { event.preventDefault(); if (shown.length) go(shown[0]); });
  list.addEventListener("scroll", draw);
  addEventListener("resize", draw);
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (step && shown.length) {
      event.preventDefault();
      const at = shown.indexOf(chosen), next = at < 0 ? 0 : Math.max(0, Math.min(shown.length - 1, at + step));
      if (matchMedia("(max-width: 700px)").matches) { chosen = shown[next]; list.scrollTop = Math.max(0, next * HEIGHT - list.clientHeight / 2); draw(); } else go(shown[next], true);
    } else if (event.key === "Enter" && chosen >= 0) { go(chosen); card.focus(); }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); form.find.focus(); form.find.select(); }
    if (event.key === "Escape" && root.contains(document.activeElement)) {
      if (document.activeElement === form.find && form.find.value) { form.find.value = ""; refresh(); }
      else { if (location.hash.startsWith("#f")) history.pushState(null, "", "#browser"); root.classList.remove("opened"); list.focus(); }
    }
  });

  pick(0).then(async () => {
    await follow();
    if (chosen < 0 && shown.length && !matchMedia("(max-width: 700px)").matches) { await open(shown[0]); root.classList.remove("opened"); }
    root.dataset.ready = "true";
  });
})();
