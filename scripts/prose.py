"""Prose check: reports phrases that are translated, figurative or wordy, in documentation and in code.

    python scripts/prose.py [FILE ...]

Markdown is checked without its code, Python files in their docstrings, comments and messages, shell scripts in their
comments. Each file is checked with proselint (cliches, redundancy and other checks that technical text can pass) and
with the phrases below, which proselint does not know. Exit code 1 if there are findings.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from proselint.checks import __register__
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).resolve().parent.parent
CHECKED = (
    "*.md", "docs/**/*.md", "benchmarks/*.md", "benchmarks/*.py", "scripts/*.py", "scripts/*.sh", "examples/*.py",
    "*.py", "core/**/*.py", "models/**/*.py", "configs/**/*.py", "deploy/**/*.py",
    "data/**/*.py", "pipeline/**/*.py", "quant/**/*.py", "report/**/*.py", "training/**/*.py",
)  # fmt: skip
PHRASES = {  # regular expression -> what to write
    r"without a word": "silently, or: without a message",
    r"stands? in (for|here|behind|under)|stand-in": "replaces, or: is used instead of",
    r"from the (image|same codes) on\b": "starting from the image",
    r"(take|go|come) the same way": "is handled in the same way",
    r"circumstances": "conditions, or: environment",
    r"\brooms?\b": "memory, or: space",
    r"takes? \w+ off\b|another \d+ ?% off": "reduces by",
    r"\bin turns\b": "alternately",
    r"held against|holds? .{1,30} against": "compared with",
    r"\bheld to\b": "must meet, or: tested with",
    r"what .{1,30} (is|are) worth\b|worth as much as": "how reliable",
    r"lead(s|ing)? (nowhere|back)": "broken, or: converts back",
    r"in its own words|in words of its own|own words": "in its own message",
    r"(is|are|was|were) told\b|tells? (it|them) apart": "is reported",
    r"told? .{1,20} (what|that|which) .{1,40}, and": "says",
    r"\bthe surest\b|\bsurest\b": "most confident",
    r"\bbeside (the|it|them|each|those|that|this|NNCF|INT8|its|one|what)": "next to, compared with, or: in addition to",
    r"\blies? beside\b": "is next to",
    r"\bon the way\b": "during the search",
    r"\bdear(er|est)?\b": "expensive",
    r"\bluck\b|\bby luck\b": "chance",
    r"\b(whose|in whose) place\b|in (the |its )?place of": "instead of",
    r"\bmended?\b|\bmending\b|\bmends\b": "fix",
    r"\blooks? like nothing\b|\bhangs? on\b": "depends on",
    r"\bat the door\b": "at the boundary",
    r"\bhas (its|their) say\b|\bhas no say\b": "has no effect",
    r"\bis had\b|\bto be had\b": "is available",
    r"\bjoins? hands\b|\bshakes? hands\b": "agree",
    r"\bgives? way\b|\bgives? out\b": "fails",
    r"\bup to scratch\b|\bby and large\b|\ball the same\b": "say it directly",
    r"\bsays? nothing (of|about) (it|them|that)\b": "does not cover",
    r"\bthe like\b|\band the rest\b|\band what not\b": "name them",
    r"(?<!there )\b(is|are) no (?!longer|more\b|less\b|such\b|\w+er\b)[A-Za-z]": "is not a",
    r"\bgo(es)? on\b": "continues, or: waits",
    r"\bin (a|an) \w+ of (its|their) own\b|in \w+ of their own\b": "in a separate ...",
    r"\bstrangers?\b": "untrusted, or: other people",
    r"with the proof\b|shows the proof\b": "say what is measured",
    r"\bbehind (a|an|the|each|it)\b": "after, or: below",
    r"\bany more\b": "no longer",
    r"\bthe height of the\b": "the values of the",
    r"\bunderneath\b|\bthereby\b|\bwhereby\b|\btherein\b|\bhereof\b|\bhereby\b": "use plain words",
}
COMPILED = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in PHRASES.items()]
CHECKS = {
    **{name: False for name in DEFAULT["checks"]},
    **{
        name: True
        for name in (
            "archaism", "cliches", "hedging", "industrial_language", "malapropisms", "mixed_metaphors", "mondegreens",
            "needless_variants", "nonwords", "oxymorons", "redundancy", "uncomparables",
        )
    },
}  # fmt: skip


def blank(match: re.Match[str]) -> str:
    """Spaces in place of the characters of a match; line ends stay, so that positions stay."""
    return re.sub(r"[^\n]", " ", match[0])


def prose_of_markdown(text: str) -> str:
    """Text without code blocks, inline code, link targets and tags."""
    for pattern in (r"(?ms)^ *```.*?^ *```", r"`[^`]*`", r"(?<=\])\([^)]*\)", r"<[^>\n]+>"):
        text = re.sub(pattern, blank, text)
    return text


def prose_of_python(text: str) -> str:
    """Text of comments and strings with a space in them; the rest is blank."""
    lines = [list(re.sub(r"[^\n]", " ", line)) for line in text.splitlines(keepends=True)]
    kept = {"COMMENT", "STRING", "FSTRING_MIDDLE"}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in kept or " " not in token.string:
            continue
        (row, column), parts = token.start, token.string.split("\n")
        for offset, part in enumerate(parts):
            start = column if offset == 0 else 0
            lines[row - 1 + offset][start : start + len(part)] = part
    return re.sub(r"``?[^`\n]+``?", blank, "".join("".join(line) for line in lines))


def prose_of_shell(text: str) -> str:
    """Text of the comments; the rest is blank."""
    return re.sub(r"(?m)^(?!\s*#).*$", blank, text)


READERS = {".md": prose_of_markdown, ".py": prose_of_python, ".sh": prose_of_shell}


def findings(path: Path) -> Iterator[str]:
    """One line for each finding: path:line: phrase: what to write."""
    text = path.read_text(encoding="utf-8")
    prose = READERS[path.suffix](text)
    joined = re.sub(r"\n[ \t#*>]*", lambda match: " " * len(match[0]), prose)  # phrases may cross line ends
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    for pattern, advice in COMPILED:
        for match in pattern.finditer(joined):
            line = prose.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: {' '.join(match[0].split())!r}: {advice}"
    for result in LintFile(str(name), prose).lint({"checks": CHECKS, "max_errors": 1000}):
        yield f"{name}:{result.pos[0]}: {result.check_result.check_path}: {result.check_result.message}"


def main(arguments: list[str]) -> int:
    """Check the named files, or all of them."""
    CheckRegistry().register_many(__register__)
    paths = [Path(argument).resolve() for argument in arguments]
    paths = paths or sorted({path for pattern in CHECKED for path in ROOT.glob(pattern)})
    lines = [line for path in paths for line in findings(path) if path != Path(__file__).resolve()]
    print("\n".join([*lines, f"{len(lines)} findings in {len(paths)} files"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
