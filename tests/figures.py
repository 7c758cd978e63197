"""Figures of how the code reads, measured on the package or on folders: `python -m tests.figures [FOLDER ...]`."""

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from corun_ray import PACKAGE

VERBS = frozenset(
    """
    accept acquire add adopt advance aggregate allow announce answer append apply ask assemble assign attach average
    await begin bind blend blur bound bring build calculate call cancel carry catch change check choose clamp clean
    clear click close collect colour combine compare compile complete compose compress compute configure confirm
    connect construct continue convert copy correct count cover create crop cut darken deal decide declare decode
    decompress delete deliver deploy derive describe detect determine discard disconnect divert divide double
    download draw drop dump embed emit encode end enforce ensure enter enumerate escape estimate evaluate examine
    execute exit expand explain export express extract fail fetch fill filter find finish fit fix flatten flip follow
    forget format forward free freeze gather generate get give go group guess halt hand handle hash hide hold
    implement index infer inform initialise insert insist inspect install interpolate interpret invert iterate join
    judge keep kill label lay lead leave let limit list listen load locate lock log look lower make map mark match
    measure merge mix model move multiply name narrow normalise note notice notify observe offer open order own pack
    pad parse pass pause permute pick place plan play plot point pool post postpone predict prefetch prepare print probe
    process produce promote propose prove provide pull push put query quiet raise randomise rank rate re-haze reach
    read receive recognise record reduce refuse register reject release reload remember remove rename render repeat
    replace reply report represent reserve reset resize resolve respond restart restore resume retry return reuse
    rewrite round run sample save say scale scan schedule score search see select send separate serve set settle
    shard share sharpen show shrink shut sign size skip sleep smooth solve sort split spread stack stage start state
    stay stop store stream strip submit subtract sum summarise supply swap switch synthesise take tell test tie time
    title trace track train transform translate transpose traverse treat trim try turn undo unite unpack update
    upload use validate verify view visit wait wake walk warm warn watch weigh weight whiten wrap write yield zip
    """.split()  # noqa: SIM905
)


class Counts:
    """What is added up over all files."""

    def __init__(self) -> None:
        self.code = self.comments = self.inside = self.blank_inside = self.comprehensions = 0
        self.first_words: list[int] = []
        self.verbs: list[bool] = []
        self.classes: Counter[str] = Counter()
        self.actors_any = 0
        self.long_functions = 0


def count_file(path: Path, counts: Counts) -> None:
    """Add a file's lines, comments, docstrings and classes to `counts`."""
    text = path.read_text("utf-8")
    lines, tree = text.split("\n"), ast.parse(text)

    # Code lines hold a token that is neither a comment nor a string of its own (a docstring).
    doc_lines = set(find_docstring_lines(tree))
    code_lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            counts.comments += not token.string.startswith(("# noqa", "# type:"))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code_lines |= {*range(token.start[0], token.end[0] + 1)} - doc_lines
    counts.code += len(code_lines)

    for node in ast.walk(tree):
        counts.comprehensions += isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            counts.classes[node.name] += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count_function(node, lines, counts)


def count_function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], counts: Counts) -> None:
    """Add a function's blank lines, docstring and parameters to `counts`."""
    body = lines[node.lineno - 1 : node.end_lineno]
    inner = len(ast.get_docstring(node, clean=False).split("\n")) if ast.get_docstring(node) else 0
    counts.inside += len(body) - inner
    docstring = ast.get_docstring(node, clean=False) or ""
    counts.blank_inside += sum(not line.strip() for line in body) - docstring.count("\n\n")
    counts.long_functions += len(body) > 40
    if docstring:
        words = docstring.split("\n")[0].split()
        counts.first_words.append(len(words))
        first = words[0].strip("`*.,:;").lower()
        counts.verbs.append(first in VERBS or first.removesuffix("s") in VERBS or first.removesuffix("es") in VERBS)
    for argument in [*node.args.args, *node.args.kwonlyargs]:
        named = any(word in argument.arg for word in ("actor", "board", "shard", "keeper", "cache", "handle"))
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        is_any = "Any" in annotation.replace("ActorProxy[Any]", "")
        counts.actors_any += named and is_any


def find_docstring_lines(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of all strings that stand as statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def main() -> None:
    """Print one line for each figure."""
    folders = [Path(folder) for folder in sys.argv[1:]] or [PACKAGE]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    counts = Counts()
    for path in files:
        count_file(path, counts)
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in files}
    real = [length for path, length in lengths.items() if path.name != "__init__.py"]
    longest = max(lengths, key=lambda path: lengths[path])
    twice = sorted(name for name, number in counts.classes.items() if number > 1)
    print(f"files                              {len(real)} (and {len(files) - len(real)} __init__.py)")
    print(f"lines                              {sum(lengths.values())}")
    print(f"median, longest file               {statistics.median(real):.0f}, {lengths[longest]} ({longest.name})")
    print(f"functions over 40 lines            {counts.long_functions} of {len(counts.first_words)} with a docstring")
    print(f"comments a 100 code lines          {100 * counts.comments / counts.code:.1f}")
    print(f"blank lines inside functions       {100 * counts.blank_inside / counts.inside:.1f} %")
    print(f"comprehensions a 100 code lines    {100 * counts.comprehensions / counts.code:.1f}")
    print(f"words of a docstring's first line  {statistics.mean(counts.first_words):.1f}")
    print(f"docstrings that begin with a verb  {100 * statistics.mean(counts.verbs):.0f} % of functions")
    print(f"public class names twice           {len(twice)} {' '.join(twice)}")
    print(f"parameters Any that hold actors    {counts.actors_any}")


if __name__ == "__main__":
    main()
