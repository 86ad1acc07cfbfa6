"""Standard output and error that are closed, full, deaf, or of an encoding without our signs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import faults, small
from tests.test_engine import write_case

HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
PROGRAM = [sys.executable, "-B", "-m", "dora_export"]
COMMANDS = {
    "inspect": ["inspect", "adapter", "--base", "base"],
    "inspect --json": ["inspect", "adapter", "--json"],
    "merge": ["merge", "base", "adapter", "-o", "out"],
    "merge --json": ["merge", "base", "adapter", "-o", "out", "--json"],
    "--help": ["--help"],
    "merge --help": ["merge", "--help"],
    "--version": ["--version"],
}
REFUSED = {"refused": ["inspect", "nothing"], "wrong usage": ["merge"], "no option": ["--nonsense"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    small.write_pair(folder)
    return folder


@pytest.fixture
def at(made, tmp_path):
    """The pair by links, and a place for outputs."""
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def shell(at, line, *words, **env):
    """Run the program as ``"$@"`` of a line of bash."""
    return subprocess.run(
        ["bash", "-c", line, "-", *PROGRAM, *words],
        cwd=at, env=HERE | env, capture_output=True, check=False, timeout=60,
    )  # fmt: skip


def check_published(at, words):
    if "merge" in words and "--help" not in words:
        tensors = small.base_tensors()
        small.check_merged(at / "out", tensors, small.adapter_tensors(tensors))
        assert not list(at.glob(".out*"))


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_reader_who_left_ends_the_program_as_shells_expect(at, words):
    """Nobody reads from the start, so that even the first line finds the pipe broken."""
    reads, writes = os.pipe()
    os.close(reads)
    result = subprocess.run(
        [*PROGRAM, *words], cwd=at, env=HERE, stdout=writes, stderr=subprocess.PIPE, check=False,
        timeout=60,
    )  # fmt: skip
    os.close(writes)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")
    check_published(at, words)


def test_reader_who_takes_a_line_gets_it(at):
    result = shell(at, '"$@" | head -1; exit ${PIPESTATUS[0]}', *COMMANDS["inspect"])
    assert result.stdout == b"adapter\n"
    assert result.stderr == b""
    assert result.returncode in (0, 141)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_report_that_finds_no_space_is_one_clear_error(at, words):
    result = shell(at, '"$@" > /dev/full', *words)
    assert result.returncode == 2
    assert result.stderr.decode() == (
        "error: standard output: No space left on device. The work is done, its report is lost; "
        "send it elsewhere.\n"
    )
    check_published(at, words)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "words", [COMMANDS["merge"], COMMANDS["inspect"]], ids=["merge", "inspect"]
)
def test_closed_streams_are_no_fault_and_no_output_file_takes_their_place(at, words, closed):
    before = small.entries(at / "base")
    result = shell(at, f'"$@" {closed}', *words)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    assert (result.stdout == b"") == (">&-" in closed.split())
    check_published(at, words)
    assert small.entries(at / "base") == before


TALKATIVE = """
import os
from dora_export.cli import main, text
def talk(what, *_):
    def show(done, total):
        for descriptor in (0, 1, 2):
            os.write(descriptor, b"as a C library does")
    return show
text._lines = talk
main()
"""


def test_what_a_library_prints_goes_into_no_output_file(at):
    line = '"$0" -B -c "$1" "${@:2}" <&- >&- 2>&-'
    result = subprocess.run(
        ["bash", "-c", line, sys.executable, TALKATIVE, *COMMANDS["merge"], "--verify", "none"],
        cwd=at, env=HERE, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0
    check_published(at, COMMANDS["merge"])


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" 2> /dev/full', '"$@" 2>&1 > /dev/full | true; '
                                  "exit ${PIPESTATUS[0]}"])  # fmt: skip
@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_refusal_that_nobody_hears_keeps_its_exit_code(at, words, line):
    result = shell(at, line, *words)
    assert (result.returncode, result.stdout, result.stderr) == (2, b"", b"")


SLOW_PROGRESS = """
import sys
from dora_export.cli import main, text
text.LINE_SECONDS = 0.0
main()
"""


@pytest.mark.parametrize("stream", ["| true", "| head -1", "> /dev/full"])
def test_merge_goes_on_when_nobody_reads_its_progress(at, stream):
    line = f'"$0" -B -c "$1" "${{@:2}}" 2>&1 > report {stream}; exit ${{PIPESTATUS[0]}}'
    if stream.startswith(">"):
        line = '"$0" -B -c "$1" "${@:2}" > report 2> /dev/full'
    result = subprocess.run(
        ["bash", "-c", line, sys.executable, SLOW_PROGRESS, *COMMANDS["merge"]],
        cwd=at, env=HERE, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    check_published(at, COMMANDS["merge"])
    assert (at / "report").read_text(encoding="utf-8").startswith("merged 4 DoRA tensors")


ENCODINGS = {
    "C": {"LC_ALL": "C"},
    "POSIX": {"LC_ALL": "POSIX", "LANG": ""},
    "C, not coerced": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "ascii:strict": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252:strict"},
    "cp437": {"PYTHONIOENCODING": "cp437"},
    "utf-8": {"PYTHONIOENCODING": "utf-8:strict"},
}


# Those that are one of each kind: where Python picks another, where it does not, and a narrow one.
ALWAYS = ("C", "C, not coerced", "cp1252")


@pytest.mark.parametrize(
    "env",
    [pytest.param(env, id=name, marks=[] if name in ALWAYS else pytest.mark.nightly)
     for name, env in ENCODINGS.items()],
)  # fmt: skip
def test_no_encoding_is_an_error(at, env):
    """Names of files and tensors hold signs of every script, and bytes that are no text."""
    name = os.fsdecode("✓é🦜".encode() + b"\xff")
    (at / name).symlink_to(at / "adapter")
    for words in (["inspect", name], ["inspect", f"{name}-gone"], ["inspect", name, "--json"],
                  ["merge", "base", "adapter", "-o", f"out-{name}"]):  # fmt: skip
        result = shell(at, '"$@"', *words, **env)
        wrong = words[1].endswith("gone")
        assert result.returncode == (2 if wrong else 0), result.stderr
        assert b"Traceback" not in result.stderr
        assert b"UnicodeEncodeError" not in result.stderr
        assert (result.stdout == b"") == wrong
    assert (at / f"out-{name}" / "dora_export.json").is_file()


def test_signs_have_plain_stand_ins_where_the_encoding_has_none(at):
    result = shell(at, '"$@"', "inspect", "adapter", PYTHONIOENCODING="latin-1")
    lines = result.stdout.decode("latin-1").splitlines()
    assert any(line.split()[:2] == ["+", "PEFT,"] for line in lines)
    assert any(line.split()[:2] == ["x", "vLLM"] for line in lines)


def test_messages_carry_nothing_that_a_terminal_obeys(at):
    name = "\x1b[31mred\x1b]0;title\x07"
    (at / name).mkdir()
    for words in (["inspect", name], ["merge", name, "adapter", "-o", "out"],
                  ["merge", "base", "adapter", "-o", name + "/"]):  # fmt: skip
        result = shell(at, '"$@"', *words)
        assert b"\x1b" not in result.stdout + result.stderr
        assert b"\x07" not in result.stdout + result.stderr
        assert rb"\x1b[31mred" in result.stdout + result.stderr


def test_hang_up_of_the_terminal_leaves_no_output(tmp_path):
    """A merge that a closing terminal ends is one that was killed: absent, and run again."""
    write_case(tmp_path, layers=8, out=1100, inputs=700)
    code = (
        "import os, signal, sys\n"
        "from dora_export.cli import main\n"
        "from dora_export.writers.files import FileSink\n"
        "write = FileSink.write\n"
        "def hang_up(*args):\n"
        "    write(*args)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "FileSink.write = hang_up\n"
        "main()\n"
    )
    words = [*COMMANDS["merge"], "--threads", "1"]
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path, env=HERE, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == -signal.SIGHUP
    assert list(tmp_path.glob(".out*/model.safetensors"))
    assert not (tmp_path / "out").exists()


def test_openblas_is_told_not_to_start_threads(at):
    """Where it cannot have them it sends SIGINT to the process that imports numpy."""
    code = (
        "import os, sys, time\n"
        "from dora_export.cli import main\n"
        "sys.argv[1:] = ['inspect', 'adapter', '--base', 'base']\n"
        "def count():\n    return len(os.listdir('/proc/self/task'))\n"
        "try:\n    main()\n"
        "finally:\n"
        "    for _ in range(100):  # a thread that was joined is listed for a moment longer\n"
        "        if count() > 1:\n            time.sleep(0.02)\n"
        "    print(count(), 'numpy' in sys.modules)\n"
    )
    env = {k: v for k, v in HERE.items() if k != "OPENBLAS_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=at, env=env, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "1 True"


def test_program_whose_libraries_find_no_memory_says_so(at):
    result = faults.command("inspect", "adapter", cwd=at, limits=f"ulimit -v {64 * 1024}")
    faults.check_refused(result, "memory: the program itself needs up to", "ulimit -v")
