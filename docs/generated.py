"""The pages that are made of the sources, when the documentation is built: nothing of them is typed twice.

The home page is the README; a method's page is its docstring, with the paper's equations, beside its code; parts that
methods share have pages of the same kind; papers are collected from all docstrings; errors from their tree. Equations
become MathML, which a browser draws by itself, so that a page loads nothing from elsewhere.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "fedloom"
PARTS = (
    *("adapters", "alignment", "transport", "integration", "permuting", "lowrank", "rotation", "pruning"),
    *("distillation", "sharing", "training", "metrics", "statistics"),
)
MADE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "src/fedloom/errors.py": "errors.md",
    "src/fedloom/methods": "methods/README.md",
}
MATH = re.compile(r"^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
PAPER = re.compile(r"(?:([A-Z][^().]{0,40}?) )?(?:\(([^()]*?),? ?)?arXiv (\d{4}\.\d{4,5})")
TOKEN = re.compile(r"mathml-((?:[0-9a-f]{2})+)-end")


def on_files(files: Files, config: Any) -> Files:
    """All generated pages, among those that are written by hand."""
    for path, text in generated():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Equations, which Markdown has carried through as one word each."""
    return TOKEN.sub(lambda found: convert(bytes.fromhex(found[1]).decode(), display="block"), html)


class Equations(Extension):
    """The same for the docstrings that mkdocstrings shows."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """One object's docstring."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def generated() -> Iterator[tuple[str, str]]:
    """Path and text of every page."""
    yield "index.md", within_docs((ROOT / "README.md").read_text("utf-8"))
    yield "contributing.md", within_docs((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    yield "changelog.md", within_docs((ROOT / "CHANGELOG.md").read_text("utf-8"))
    methods = sorted(path for path in (PACKAGE / "methods").glob("*.py") if path.stem != "__init__")
    parts = [PACKAGE / f"{name}.py" for name in PARTS]
    for path in methods:
        yield f"methods/{path.stem}.md", beside(path)
    for path in parts:
        yield f"methods/parts/{path.stem}.md", beside(path)
    yield "methods/README.md", index(methods, parts)
    yield "papers.md", papers()
    yield "errors.md", errors()


def on_page_markdown(text: str, *, page: Any, **_: Any) -> str:
    """What a page links to beside docs, where the repository is read, as the page of this site that is made of it."""
    up = "../" * page.file.src_uri.count("/")
    for path, own in MADE.items():
        text = text.replace(f"]({up}../{path})", f"]({up}{own})")
    return text


def within_docs(text: str) -> str:
    """A page of the repository's root, as it stands in docs: its links lose `docs/`, or lead to a generated page."""
    text = text.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^\]]+)\]\(LICENSE\)", r"\1", text)


def markdown(docstring: str) -> str:
    """A docstring as Markdown: equations as tokens, and what belongs to a list item indented as Markdown asks."""

    def token(found: re.Match[str]) -> str:
        code = " ".join(found[2].split())
        return f"{found[1]}mathml-{code.encode().hex()}-end"

    lines: list[str] = []
    item = False
    for line in MATH.sub(token, docstring).splitlines():
        if re.match(r"(\d+\.|-) ", line):
            item = True
        elif line and not line.startswith(" "):
            item = False
        body = line.lstrip()
        lines.append(f"    {body}" if item and 0 < len(line) - len(body) < 4 else line)
    return "\n".join(lines)


def beside(path: Path) -> str:
    """A module's docstring, and its code next to it."""
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    summary, _, rest = (ast.get_docstring(tree) or "").partition("\n")
    name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
    first = next(node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign))
    start = min([first.lineno, *(one.lineno for one in getattr(first, "decorator_list", []))])
    code = "\n".join(source.splitlines()[start - 1 :])
    head = (
        f'# {path.stem}\n\n{summary}\n\n<div class="beside" markdown>\n<div class="equations" markdown>\n\n'
        f"{markdown(rest.strip())}\n\n</div>\n<div markdown>\n\n"
    )
    return f'{head}```python title="{name}" linenums="{start}"\n{code}\n```\n\n</div>\n</div>\n'


def index(methods: list[Path], parts: list[Path]) -> str:
    """The list of methods, and of what they share."""

    def row(path: Path, folder: str) -> str:
        summary = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
        return f"| [{path.stem}]({folder}{path.stem}.md) | {summary} |"

    lines = [
        "# Methods",
        "",
        "Each is one file, to be read beside its paper: on the left the equations and every deviation from them, on",
        "the right the code. `[method] name` in a recipe is the name below; many rows of a comparison are one of these",
        "with other options, as FedProx is `fedavg` with `mu`.",
        "",
        *("| method | what it is |", "| --- | --- |", *(row(path, "") for path in methods)),
        "",
        "## What they share",
        "",
        *("| part | what it is |", "| --- | --- |", *(row(path, "parts/") for path in parts)),
    ]
    return "\n".join(lines) + "\n"


def papers() -> str:
    """Every paper that a docstring cites by its number at arXiv, and where."""
    cited: dict[str, tuple[str, set[str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            for before, within, number in PAPER.findall(text):
                who = within.strip(" ,;")
                who = f"{before.split(' of ')[-1]}, {who}" if who.isdigit() else who  # Antol et al. (2015, ...)
                known, where = cited.get(number, ("", set()))
                cited[number] = (known or who, where | {name})
    lines = [
        "# Papers",
        "",
        "Every paper that the code cites, and where it does; a deviation from one stands in the docstring there.",
        "",
        *("| paper | arXiv | in |", "| --- | --- | --- |"),
    ]
    for number, (who, where) in sorted(cited.items(), key=lambda item: (item[1][0] or "~", item[0])):
        modules = ", ".join(_page(name) for name in sorted(where))
        lines.append(f"| {who or '–'} | [{number}](https://arxiv.org/abs/{number}) | {modules} |")
    return "\n".join(lines) + "\n"


def _page(module: str) -> str:
    """A link to the module's page, where it has one."""
    *_, above, name = module.split(".")
    if above == "methods":
        return f"[{module}](methods/{name}.md)"
    return f"[{module}](methods/parts/{name}.md)" if name in PARTS and above == "fedloom" else f"`{module}`"


def errors() -> str:
    """The tree of errors."""
    text = ast.get_docstring(ast.parse((PACKAGE / "errors.py").read_text("utf-8"))) or ""
    summary, tree, rest = re.split(r"\n\n(?=    FedloomError)|\n\n(?=A message)", text)
    return (
        f"# Errors\n\n{summary}\n\n```text\n{textwrap.dedent(tree)}\n```\n\n{rest}\n\n"
        "In Python all of them are caught as `fedloom.errors.FedloomError`. What a site cannot do costs a run nothing: "
        "it falls silent for the round, `rounds.jsonl` and the report name it with the reason, and the round counts "
        "where the quorum of `[federation]` is met.\n\n"
        "| what you see | what to do |\n| --- | --- |\n"
        "| `there is no recipe 'quikstart'` | take what it suggests: names are guessed at |\n"
        "| `the loss is nan` | lower `[training] lr`, or set `[training] clip` |\n"
        "| `3 of 10 sites answered, the quorum is 10` | lower `[federation] quorum`, or see to the sites named |\n"
        "| `'runs/a' holds a run already` | go on with it (`--resume`), or name another folder (`--out`) |\n"
        "| `not installed` | the message has the command: `pip install 'fedloom[EXTRA]'` |\n"
    )
