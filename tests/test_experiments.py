"""The programs that a user starts on a model of their own: what they refuse, and that it is found before the model is loaded."""

import os
import re
import subprocess
import sys

import pytest

from tests.tiny import write_folder

QUICKLY = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model: no chat template, and no gates."""
    folder = write_folder(tmp_path_factory.mktemp("model"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "text.txt").write_text("Agatha paid $48 for the boat. " * 20)
    return folder


def run(program, *arguments):
    return subprocess.run([sys.executable, "-m", f"experiments.{program}", *arguments], capture_output=True, text=True, env=QUICKLY)


def test_generate_takes_a_model_without_gates(folder):
    done = run("generate", f"--model={folder}", "--prompt=Who came?", "--policy=window", "--budget=8", "--window=2", "--sinks=1", "--max_new_tokens=2")
    assert done.returncode == 0, done.stderr
    assert "kept_entries=" in done.stdout


def test_kept_reads_a_text_as_it_is_where_there_is_no_template(folder, tmp_path):
    done = run("kept", f"--model={folder}", "--policy=window", "--budget=0.3", f"--context={folder}/text.txt", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "kept.html").read_text().count("&loz;") == 0, "no tokens of a template"


def test_kept_says_that_it_needs_a_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        failed = run("kept", f"--model={folder}", "--policy=window", f"--context={folder}/text.txt", f"--workdir={tmp_path}/run")
    finally:
        (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    assert failed.returncode != 0 and "ValueError: the model has no tokenizer, so it takes no text" in failed.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--prompt=a", "--context=absent.txt"], "No such file or directory: 'absent.txt'"),
        (["generate", "--prompt=a", "--policy=windw"], "unknown policy 'windw': did you mean window?"),
        (["generate", "--prompt=a", "--budget=0"], "budget must be at least 1 token per stream"),
        (["kept", "--workdir={}/run", "--context=absent.txt"], "No such file or directory: 'absent.txt'"),
        (["kept", "--workdir={}/run", "--policy=windw"], "unknown policy 'windw': did you mean window?"),
        (["kept", "--workdir={}/run", "--budget=0"], "a fractional budget must be in (0, 1]"),
    ],
)
def test_mistakes_are_found_before_a_model_is_looked_for(tmp_path, arguments, message):
    failed = run(*(one.format(tmp_path) for one in arguments), f"--model={tmp_path}/absent")
    assert failed.returncode != 0 and message in failed.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stream", "--config=configs/stream.py:story", "--config.budgets=(0.125,)"], "config.budgets must be whole numbers of tokens per stream, got 0.125"),
        (["stream", "--config=configs/stream.py:story", "--config.policies=()"], "config.policies and config.budgets must each name at least one"),
        (["stream", "--config=configs/stream.py:story", "--config.kind=storys"], "unknown kind of stream 'storys': did you mean story?"),
        (["stream", "--config=configs/stream.py:story", "--config.temperature=-1"], "temperature must be 0 (greedy) or more, got -1.0"),
        (["hindsight", "--config=configs/eval_prose.py", "--config.budgets=(0.0001,)"], "must be at least one token of a context of 1024, got 0.0001"),
        (["hindsight", "--config=configs/eval_prose.py", "--config.budgets=()"], "config.lengths and config.budgets must each name at least one"),
        (["evaluate", "--config=configs/eval_needles.py", "--config.prefill_chunk=0"], "policies that read a context whole are named in config.one_shot"),
        (["dilution", "--config.budget=0"], "config.budget must be a whole number of at least 1, got 0"),
        (["dilution", "--config.distractors=()"], "config.distractors must be numbers of at least 1, and one of them or more"),
        (["ablate", "--config=configs/ablations.py", "--config.seeds=(0, -1)"], "seed must be a whole number from 0 to 2**32 - 1, got -1"),
        (["ablate", "--config=configs/ablations.py", "--config.order=()"], "config.order and config.seeds must each name at least one"),
        (["ablate", "--config=configs/ablations.py", "--config.evaluate.policies=('retension',)"], "unknown policy 'retension': did you mean retention"),
    ],
)
def test_mistakes_in_a_config_are_found_before_anything_runs(tmp_path, arguments, message):
    failed = run(*arguments, f"--workdir={tmp_path}/run")
    assert failed.returncode != 0 and message in failed.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "program, config, message",
    [
        ("evaluate", "smollm2_135m.py", "--config has no .*samples.*: it is another program's; give one of configs/eval_"),
        ("train_gates", "eval_needles.py", "--config has no .*checkpoint_every.*: it is another program's; give one such as configs/smollm2_135m.py"),
        ("stream", "eval_needles.py", "--config has no .*piece.*: it is another program's; give configs/stream.py:story or :prose"),
    ],
)
def test_a_config_of_another_program_is_refused(tmp_path, program, config, message):
    failed = run(program, f"--config=configs/{config}", f"--workdir={tmp_path}/run")
    assert failed.returncode != 0 and re.search(message, failed.stderr + failed.stdout) and not (tmp_path / "run").exists()
