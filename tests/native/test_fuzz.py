"""The fuzz targets for two seconds each, from a fixed seed: the corpus, then mutations of it.

`make fuzz` looks longer, and with a coverage-guided fuzzer where there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZ = Path(__file__).with_name("fuzz")
SOURCES = ROOT / "native" / "src"
TARGETS = sorted(path.stem for path in FUZZ.glob("fuzz_*.c"))

# What each target must see, or its silence proves nothing: one defect each, in a file and a
# line that others get by without.
PLANTED = {
    "fuzz_encapsulate": ("icmp.c", "quote_len > header->total_len", "quote_len > 0xfffe"),
    "fuzz_decapsulate": ("verdict.c", "fib_is_own(fib, header.source)", "false"),
    "fuzz_fragment": ("fragment.c", "taken / 8", "taken / 16"),
    "fuzz_segment": ("segment.c", "segmenter->id++", "(void)0"),
    "fuzz_coalesce": ("coalesce.c", "payload_len > item->gso_size", "false"),
    "fuzz_fib": ("fib.c", "count > fib->table_count - offset", "false"),
    "fuzz_filter": ("facts.c", "transport.len > TCP_OFF_FLAGS", "transport.len"),
    "fuzz_engine": ("batch_decap.c", "bytes_in -= tally.bytes_in", "bytes_in -= 0"),
}


def build(sources: Path, directory: Path) -> None:
    command = ["sh", str(FUZZ / "build.sh"), "gcc", str(sources), str(directory), *TARGETS]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def fuzz(directory: Path, target: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs in the program's directory, where a crash leaves its input."""
    command = [f"./{target}", "-seconds", str(seconds), "-seed", "1", str(FUZZ / "corpus" / target)]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, timeout=200)


def fuzz_all(
    sources: Path, directory: Path, seconds: float
) -> dict[str, subprocess.CompletedProcess[str]]:
    build(sources, directory)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip(
                TARGETS,
                pool.map(lambda target: fuzz(directory, target, seconds), TARGETS),
                strict=True,
            )
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    return fuzz_all(SOURCES, tmp_path_factory.mktemp("fuzz"), 2)


@pytest.fixture(scope="module")
def planted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, subprocess.CompletedProcess[str]]]:
    directory = tmp_path_factory.mktemp("planted")
    sources = directory / "src"
    shutil.copytree(SOURCES, sources)
    for file, sound, broken in PLANTED.values():
        text = (sources / file).read_text()
        assert text.count(sound) == 1, (file, sound)
        (sources / file).write_text(text.replace(sound, broken))
    return directory, fuzz_all(sources, directory, 60)  # it ends with the find


@pytest.mark.parametrize("target", TARGETS)
def test_target(runs: dict[str, subprocess.CompletedProcess[str]], target: str) -> None:
    ran = runs[target]
    assert (ran.returncode, ran.stderr) == (0, "")
    # More than the corpus was run, however busy the machine is.
    inputs = int(ran.stdout.split(" inputs")[0].split()[-1])
    assert int(ran.stdout.split(" runs")[0].split()[-1]) > inputs


@pytest.mark.parametrize("target", TARGETS)
def test_a_planted_defect_is_found(
    planted: tuple[Path, dict[str, subprocess.CompletedProcess[str]]], target: str
) -> None:
    directory, runs = planted
    assert runs[target].returncode == 1, runs[target].stdout
    (crash,) = directory.glob(f"crash-{target}-*")
    assert crash.name in runs[target].stderr
    # The input left behind is the one.
    again = subprocess.run([f"./{target}", crash.name], capture_output=True, cwd=directory)
    assert again.returncode == 1


def test_a_hang_is_found(tmp_path: Path) -> None:
    target = tmp_path / "hangs.c"
    target.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n"
        "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)\n"
        "{ volatile int on = 1; while (on && size == 3) { } return data == NULL; }\n"
    )
    driver = (FUZZ / "driver.c").read_text()
    assert "INPUT_SECONDS = 20" in driver
    (tmp_path / "driver.c").write_text(driver.replace("INPUT_SECONDS = 20", "INPUT_SECONDS = 1"))
    (tmp_path / "input").write_bytes(b"abc")
    command = ["gcc", "-D_GNU_SOURCE", "-o", "hangs", "hangs.c", "driver.c"]
    subprocess.run(command, check=True, cwd=tmp_path)
    ran = subprocess.run(["./hangs", "input"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert "hangs: hangs" in ran.stderr
    (crash,) = tmp_path.glob("crash-hangs-*")
    assert crash.read_bytes() == b"abc"


def contents(directory: Path) -> dict[Path, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory): path.read_bytes() for path in files}


def test_the_corpus_is_what_its_script_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.native.fuzz.make_corpus", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    kept = contents(FUZZ / "corpus")
    assert kept == contents(tmp_path)
    assert {path.parts[0] for path in kept} == set(TARGETS) == set(PLANTED)
    # It is for a repository, not an archive.
    assert len(kept) < 70
    assert sum(map(len, kept.values())) < 64 * 1024
