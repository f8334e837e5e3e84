"""Renew what is generated in the documentation, or check that it is up to date.

python docs/refresh.py            write docs/cli.md from the program's own --help, docs/api.md from docstrings
python docs/refresh.py --check    exit 1 when something is out of date
python docs/refresh.py --demo     run `saekit demo` and put what it prints into README.md (minutes)
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLI = ROOT / "docs" / "cli.md"
API = ROOT / "docs" / "api.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- demo-output -->\n```\n)(.*?)(```\n<!-- /demo-output -->)", re.DOTALL)

HEAD = """# Commands

Generated from the program's own `--help` by `make docs`; do not edit.
"""


def run(*arguments: str) -> str:
    """What a command line of saekit prints, at a fixed width."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "saekit", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def commands(help_text: str) -> list[str]:
    """Names of the commands in a help page."""
    return re.findall(r"^  ([a-z]+)  ", help_text.partition("Commands:")[2], re.MULTILINE)


def cli_page() -> str:
    """The text of docs/cli.md."""
    top = run("--help")
    parts = [HEAD, f"```\n{top.strip()}\n```\n"]
    for name in commands(top):
        parts.append(f"## saekit {name}\n\n```\n{run(name, '--help').strip()}\n```\n")
    return "\n".join(parts)


API_HEAD = """# Public names

Generated from the docstrings by `make docs`; do not edit. `import saekit as sk`, then `sk.train`; `help(sk.train)` has
parameters and errors. Classes of results, errors and everything else are imported from their rooms:
`from saekit.comparison.result import Comparison`, `from saekit.errors import ConfigError`.
"""


def api_page() -> str:
    """Return the text of docs/api.md: every public name with the first sentence of its docstring."""
    import saekit

    parts = [API_HEAD]
    for title, names in saekit.PUBLIC.items():
        rows = []
        for name, module in names.items():
            about = " ".join((inspect.getdoc(getattr(saekit, name)) or "").split("\n\n")[0].split())
            rows.append(f"| `{name}` | {about} | `saekit.{module}` |\n")
        parts.append(f"## {title}\n\n| name | what it does | defined in |\n| --- | --- | --- |\n{''.join(rows)}")
    return "\n".join(parts)


def problems() -> list[str]:
    """What is out of date or missing."""
    found = []
    page = cli_page()
    if not CLI.is_file() or CLI.read_text(encoding="utf-8") != page:
        found.append("docs/cli.md is out of date: run `make docs`")
    if not API.is_file() or API.read_text(encoding="utf-8") != api_page():
        found.append("docs/api.md is out of date: run `make docs`")
    readme = README.read_text(encoding="utf-8")
    if not BLOCK.search(readme):
        found.append("README.md has lost its block between <!-- demo-output --> and <!-- /demo-output -->")
    known = set(commands(run("--help")))
    named = set(re.findall(r"^(?:\$ )?saekit ([a-z]+)", readme, re.MULTILINE))
    found += [f"README.md shows `saekit {name}`, which does not exist" for name in sorted(named - known)]
    for document in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if not (document.parent / target).exists():
                found.append(f"{document.relative_to(ROOT)} links to `{target}`, which does not exist")
    return found


def put_demo() -> None:
    """Run the demo and put its table into the README."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run("demo", "--out", f"{folder}/demo").replace(f"{folder}/", "")
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda m: m[1] + printed.strip("\n") + "\n" + m[3], text), encoding="utf-8")


def main() -> int:
    """Do what the arguments say."""
    if "--check" in sys.argv:
        found = problems()
        sys.stderr.write("".join(f"{line}\n" for line in found))
        return 1 if found else 0
    if "--demo" in sys.argv:
        put_demo()
    CLI.write_text(cli_page(), encoding="utf-8")
    API.write_text(api_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
