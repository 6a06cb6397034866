"""LongProc's tasks (Ye et al. 2025, arXiv 2501.05414): whether a long generated procedure is right, by the rules of the authors' release.

Each task asks for a format, and what is not in it scores 0. Where a tag such as <Route> stands several times, its last closed pair counts, so that a model
may think aloud before it answers. Tables and programs in ``` are read as the release reads them, from the first opening to the last closing fence: one in
a model's draft, or behind the answer, becomes part of what is scored.
"""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence

TESTS = 10  # of a program, those that the release runs
SECONDS = 3  # a test may take
INCLUDED = "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream climits cassert iomanip sstream bitset".split()
FILLERS = set("a an the on in at of step think thinks believe believes belief know knows is are location".split())
COMPILE = ["g++", "-std=c++11", "-O", "-x", "c++", "-o", "program", "-"]
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def _tagged(generated: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", generated, re.DOTALL)
    return found[-1].strip() if found else ""


def countdown(generated: str, numbers: Sequence[int], target: int) -> dict[str, float]:
    """accuracy: 1 where the equations between <Solution> tags, one a line, hold, use up the numbers and each other's results, and end in `target`.

    As in the release, results on the way may be negative or above 2000, whatever the question says.
    """
    left = list(numbers)
    for line in _tagged(generated, "Solution").split("\n"):
        equation = re.fullmatch(r"\s*(-?\d{1,9})\s*([-+*/])\s*(-?\d{1,9})\s*=\s*(-?\d{1,18})\s*", line)
        if not equation:
            return {"accuracy": 0.0}
        first, second, result = (int(equation[group]) for group in (1, 3, 4))
        holds = second != 0 and first == second * result if equation[2] == "/" else _OPERATIONS[equation[2]](first, second) == result
        for number in (first, second):
            if number not in left or not holds:
                return {"accuracy": 0.0}
            left.remove(number)
        left.append(result)
    return {"accuracy": float(left == [target])}


def path_traversal(generated: str, route: str) -> dict[str, float]:
    """accuracy: 1 where the lines between <Route> tags are the route's; partial_accuracy: its part up to the first line that differs.

    The release counts that line too, so that a route which is wrong from the start has 1/n there and 0 here.
    """
    return _lines(_tagged(generated, "Route").split("\n"), route.strip().split("\n"))


def tom_tracking(generated: str, trace: str) -> dict[str, float]:
    """As `path_traversal` for the lines "- Step n: ..." from the last "- Step 0:" on.

    Case, punctuation, articles and such words as "on" or "location" do not count.
    """
    return _lines(steps(generated[max(generated.rfind("- Step 0:"), 0) :]), steps(trace))


def _lines(given: list, wanted: list) -> dict[str, float]:
    same = 0
    while same < min(len(given), len(wanted)) and given[same] == wanted[same]:
        same += 1
    return {"accuracy": float(given == wanted), "partial_accuracy": same / len(wanted)}


def steps(trace: str) -> list[list[str]]:
    """The words that count of each step."""
    found = []
    for line in trace.split("\n"):
        if re.match(r"- Step \d+:", line):
            plain = re.sub(r"[^\w\s]|_", "", line.lower())
            found.append([word for word in plain.split() if word not in FILLERS])
    return found


def html_to_tsv(generated: str, table: str) -> dict[str, float]:
    """f1, precision and recall of rows, in any order: a row counts where the other table has one with the same cells.

    The table stands between the first ```tsv and the last ```, or is the whole text; its first line is the header. Case, spaces, punctuation and articles
    do not count.
    """
    _, fence, behind = generated.partition("```tsv")
    try:
        given = rows(behind.rpartition("```")[0] or behind if fence else generated)
    except csv.Error:
        given = []
    wanted = rows(table)
    if not given:
        return dict.fromkeys(("f1", "precision", "recall"), 0.0)
    precision = sum(row in wanted for row in given) / len(given)
    recall = sum(row in given for row in wanted) / len(wanted)
    return {"f1": 2 * precision * recall / (precision + recall) if precision else 0.0, "precision": precision, "recall": recall}


def rows(table: str) -> list[tuple[str, ...]]:
    """The rows below the header; a last one of another length (a closing remark) is left out.

    Raises csv.Error for NUL bytes, and for a quotation mark that swallows over 128 KiB.
    """
    header, *found = csv.reader(table.strip().split("\n"), delimiter="\t") if table.strip() else [()]
    if found and len(found[-1]) != len(header):
        found.pop()
    return [tuple(_cell(cell) for cell in row) for row in found]


def _cell(text: str) -> str:
    return re.sub(r"\b(?:an?|the)\b|\s", "", re.sub(r"[!-/:-@\[-`{-~]", "", text.lower()))


def pseudo_to_code(generated: str, tests: Sequence[Sequence[Sequence[str]]], execute: bool = False) -> dict[str, float]:
    """accuracy: 1 where the C++ program between the first ```cpp and the last ``` compiles and prints what the first tests, (input lines, output lines),
    expect.

    This runs a program that a model wrote. It gets a folder of its own, which its tests share, no environment but PATH, and limits on the time, memory and
    file sizes of each of its processes, but it is in no sandbox: the network and files that the user may read are open to it. Hence `execute` must be True,
    else ValueError. Raises FileNotFoundError where there is no g++, OSError where it compiles nothing at all, as on a full disk.
    """
    if not execute:
        raise ValueError("pseudo_to_code runs C++ programs that the model wrote, outside any sandbox; pass execute=True where that may be done")
    if not shutil.which("g++"):
        raise FileNotFoundError("pseudo_to_code needs the compiler g++, which is not on the PATH")
    code = re.search(r"```(?:cpp|c\+\+)(.*)```", generated, re.DOTALL)
    if not code:
        return {"accuracy": 0.0}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # what a program still does to it must not end the evaluation
        source = "".join(f"#include <{name}>\n" for name in INCLUDED) + "using namespace std;\n" + code[1]
        if _run(COMPILE, source, folder, 60, check=True) is None:
            if _run(COMPILE, "int main() {}", folder, 60, check=True) is None:
                raise OSError(f"g++ cannot compile even an empty program in {folder}; see to it that the disk is not full and that g++ works")
            return {"accuracy": 0.0}
        right = all(_run(["./program"], _joined(given), folder, SECONDS) == _joined(expected) for given, expected in tests[:TESTS])
    return {"accuracy": float(right)}


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


def _run(command: list[str], given: str, folder: str, seconds: int, check: bool = False) -> str | None:
    """What a command prints; None where it takes too long, its folder is gone, and with `check` where it fails. It may have 1 GiB of memory."""
    if not os.path.isdir(folder):
        return None
    # One limit a call: dash, which Debian has for sh, refuses several and would go on without any.
    limited = ["sh", "-c", f'ulimit -t {seconds} && ulimit -v 1048576 && ulimit -f 65536 && exec "$@"', "sh", *command]
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    with tempfile.TemporaryFile() as output:  # a file, which is limited, where a pipe could fill our own memory
        process = subprocess.Popen(
            limited, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=folder, env=environment, start_new_session=True
        )
        try:
            process.communicate(given.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        if check and process.returncode:
            return None
        output.seek(0)
        try:
            return output.read().decode()
        except UnicodeDecodeError:
            return None
