"""The command line: one line and an exit code for every mistake, and the way from a module to a saved report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_fx.cli import main
from lowrank_fx.errors import LowRankError

ZOO = """
import torch

def make_model():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model

model = make_model()
batches = [torch.randn(16, 24, generator=torch.Generator().manual_seed(i)) for i in range(10)]

fresh = [torch.randn(16, 24, generator=torch.Generator().manual_seed(100 + i)) for i in range(3)]

def make_loader():
    yield from batches

def make_other():
    other = make_model()
    other[0].bias.data += 1
    return other

number = 3

def make_number():
    return number

def fail():
    raise RuntimeError("the disk\\nis full")

def likeness(optimized):
    rows = fresh[0]
    return torch.nn.functional.cosine_similarity(optimized(rows), model(rows)).mean()

def broken(optimized):
    return "good"

def loss(outputs, batch):
    return outputs.square().mean()
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, which no other test has imported."""
    name = f"zoo_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(ZOO, "utf-8")
    (tmp_path / f"{name}_broken.py").write_text("import surely_not_there\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one line that a command line ends with."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = filter(None, captured.err.splitlines())
    assert line.startswith("lowrank-fx: error: ")
    return code, line.removeprefix("lowrank-fx: error: ")


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["fly"], "No such command 'fly'."),
        (["report", "--fly", "x"], "No such option: --fly"),
        (["report"], "Missing argument 'DIR'."),
        (["optimize", "ZOO:model", "--data", "ZOO:batches"], "Missing option '--out' / '-o'."),
        (["optimize", "ZOO:model", "--data", "ZOO:batches", "--out", "o", "--seed", "x"], "Invalid value for '--seed'"),
        (["demo", "zebra"], "Invalid value for 'name'"),
        (["compare"], "Missing argument 'DIR'."),
        (["compare", "nowhere"], "nowhere/plan.json could not be read: No such file or directory"),
        (["report", "nowhere"], "nowhere/plan.json could not be read: No such file or directory"),
        (["export", "nowhere"], "give at least one of --onnx FILE, --pt2 FILE, --aoti FILE, --torchscript FILE"),
        (["export", "nowhere", "--onnx", "m.onnx"], "nowhere/plan.json could not be read: No such file or directory"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    zoo: str, capsys: pytest.CaptureFixture[str], arguments: list[str], cause: str
) -> None:
    code, said = fails(capsys, *(argument.replace("ZOO", zoo) for argument in arguments))
    assert code == 2
    assert said.startswith(cause)


@pytest.mark.parametrize(
    ("model", "data", "options", "cause"),
    [
        ("zoo", "ZOO:batches", "", "MODULE:FACTORY 'zoo': write a module and a name in it, such as zoo:make_model"),
        (":model", "ZOO:batches", "", "MODULE:FACTORY ':model': write a module"),
        ("not_there:model", "ZOO:batches", "", "MODULE:FACTORY 'not_there:model': no module 'not_there' is in "),
        ("ZOO.inner:model", "ZOO:batches", "", "MODULE:FACTORY 'ZOO.inner:model': no module 'ZOO.inner' is in "),
        ("ZOO:other", "ZOO:batches", "", "MODULE:FACTORY 'ZOO:other': module 'ZOO' has nothing called 'other'"),
        ("ZOO:number", "ZOO:batches", "", "MODULE:FACTORY 'ZOO:number' gave int, not a torch.nn.Module"),
        ("ZOO:make_number", "ZOO:batches", "", "MODULE:FACTORY 'ZOO:make_number' gave int, not a torch.nn.Module"),
        ("ZOO:model", "ZOO:make_number", "", "--data 'ZOO:make_number' gave int, which cannot be iterated over"),
        (
            "ZOO:model",
            "ZOO:batches",
            "--keep-flops .6 --tolerance .1",
            "--tolerance 0.1 and --keep-flops 0.6: give one",
        ),
        ("ZOO:model", "ZOO:batches", "--of sites", "--of sites says what a share counts; use it with --keep-params, "),
        (
            "ZOO:model",
            "ZOO:batches",
            "--keep-latency 2",
            "Keep(latency=2.0): the share that may remain must be above 0",
        ),
        ("ZOO:model", "ZOO:batches", "--keep-latency .7 --regauge", "--regauge saves parameters; use it with"),
        (
            "ZOO:model",
            "ZOO:batches",
            "--keep-params 1.5",
            "Keep(params=1.5): the share that may remain must be above 0",
        ),
        ("ZOO:model", "ZOO:batches", "--metric ZOO:likeness", "--metric ZOO:likeness needs --max-drop DROP: how much"),
        ("ZOO:model", "ZOO:batches", "--max-drop .1", "--max-drop 0.1 says how much a metric may drop; use it with"),
        ("ZOO:model", "ZOO:batches", "--max-drop .1 --keep-flops .5", "--max-drop 0.1 says how much a metric may drop"),
        (
            "ZOO:model",
            "ZOO:batches",
            "--metric ZOO:likeness --max-drop .1 --keep-flops .5",
            "--keep-flops 0.5 and --metric ZOO:likeness: give one target, not 2",
        ),
        (
            "ZOO:model",
            "ZOO:batches",
            "--metric ZOO:likeness --max-drop .1 --of model",
            "--of model says what a share counts",
        ),
        ("ZOO:model", "ZOO:batches", "--metric ZOO:other --max-drop .1", "--metric 'ZOO:other': module 'ZOO' has"),
        ("ZOO:model", "ZOO:batches", "--metric ZOO:number --max-drop .1", "Metric(3): give a function from a model"),
        (
            "ZOO:model",
            "ZOO:batches",
            "--metric ZOO:likeness --max-drop -1",
            "Metric(likeness, max_drop=-1.0): the drop",
        ),
        (
            "ZOO:model",
            "ZOO:batches",
            "--metric ZOO:broken --max-drop .1 --no-compile",
            "the metric ZOO.broken returned 'good' for the original; it must return a finite number",
        ),
        ("ZOO:model", "ZOO:batches", "--tolerance 0", "Tolerance(0.0): the error must be a finite number above 0"),
        ("ZOO:model", "ZOO:batches", "--frozen --no-compile", "--frozen says how the models are compiled; leave out"),
        ("ZOO:model", "ZOO:batches", "--skip nothing --no-compile", "skip='nothing' matches no weight of this model"),
    ],
)
def test_a_mistake_the_user_can_put_right_exits_with_2(
    zoo: str, capsys: pytest.CaptureFixture[str], model: str, data: str, options: str, cause: str
) -> None:
    arguments = ["optimize", model, "--data", data, "--out", "out", "--no-progress", *options.split()]
    code, said = fails(capsys, *(argument.replace("ZOO", zoo) for argument in arguments))
    assert code == 2
    assert said.startswith(cause.replace("ZOO", zoo))
    assert not Path("out").exists()


def test_an_unexpected_error_is_one_line_and_exits_with_1(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fails(capsys, "optimize", f"{zoo}:fail", "--data", f"{zoo}:batches", "--out", "out")
    assert code == 1
    assert said == "RuntimeError: the disk is full (run with --debug for the traceback)"


def test_what_a_users_module_misses_is_not_the_module_itself(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fails(capsys, "optimize", f"{zoo}_broken:model", "--data", f"{zoo}:batches", "--out", "out")
    assert code == 1
    assert said.startswith("ModuleNotFoundError: No module named 'surely_not_there'")


@pytest.mark.parametrize("arguments", [["--debug", "report", "nowhere"], ["report", "nowhere", "--debug"]])
def test_debug_shows_the_traceback(zoo: str, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert "StorageError: nowhere/plan.json could not be read" in error


def test_an_interruption_is_no_traceback(
    zoo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank_fx.storage.read_plan", interrupt)
    assert fails(capsys, "report", "nowhere") == (130, "interrupted")


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ([], ["demo", "optimize", "report", "compare", "export", "--version", "--debug", "--install-completion"]),
        (["--help"], ["demo", "optimize", "report", "lowrank-fx demo"]),
        (
            ["optimize", "-h"],
            ["MODULE:FACTORY", "--data", "--keep-flops", "--metric", "--max-drop", "Target (at most one)", "Example:"],
        ),
        (["demo", "--help"], ["encoder", "digits", "--out", "demo_out", "lowrank_fx[demo]"]),
        (["compare", "--help"], ["DIR", "--model", "MODULE:FACTORY", "--data", "MODULE:LOADER", "--html"]),
        (["report", "--help"], ["DIR", "--html"]),
        (["export", "--help"], ["DIR", "--onnx", "--pt2", "--aoti", "--torchscript", "--fold", "lowrank_fx[onnx]"]),
    ],
)
def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str], arguments: list[str], pieces: list[str]) -> None:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [piece for piece in pieces if piece not in captured.out] == []


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    import lowrank_fx

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lowrank-fx {lowrank_fx.__version__}\n"


def test_python_m_runs_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_fx", "report", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "lowrank-fx: error: nowhere/plan.json could not be read: No such file or directory"
    ]


def test_python_m_shows_the_help(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_fx", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Usage: lowrank-fx" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["lowrank-fx", ""], ["demo", "optimize", "report", "compare", "export", "onnx-compress"]),
        (["lowrank-fx", "comp"], ["compare"]),
        (["lowrank-fx", "demo", ""], ["encoder", "digits"]),
        (["lowrank-fx", "optimize", "--of", "s"], ["sites"]),
        (["lowrank-fx", "optimize", "--capture", ""], ["auto", "export", "modules"]),
        (["lowrank-fx", "compare", "--mod"], ["--model"]),
    ],
)
def test_bash_completes_commands_options_and_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], completions: list[str]
) -> None:
    monkeypatch.setenv("_LOWRANK_FX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == completions


def test_the_script_for_bash_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("_LOWRANK_FX_COMPLETE", "source_bash")
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert "_LOWRANK_FX_COMPLETE=complete_bash" in script
    assert "complete -o default -F _lowrank_fx_completion lowrank-fx" in script
    # --show-completion asks the process above for the shell; with this variable it takes the shell's name instead.
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_fx", "--show-completion", "bash"],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != "_LOWRANK_FX_COMPLETE"},
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == script.strip()
    assert done.stderr == ""


# ---- the way through -------------------------------------------------------------------------------------------------


def test_optimize_saves_and_report_reads(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"optimize {zoo}:make_model --data {zoo}:make_loader --keep-params 0.5 --of sites --no-compile"
    assert main([*arguments.split(), "--no-progress", "--out", "out", "--html"]) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert first.out.startswith('lowrank_fx: Keep(params=0.5, of="sites")\n')
    assert first.out.endswith("\nout/report.html shows this as a page.\n")
    assert main(["report", "out", "--html", "page.html"]) == 0
    assert capsys.readouterr().out == first.out.replace("out/report.html", "page.html")
    assert Path("page.html").read_bytes() == Path("out/report.html").read_bytes()


def test_a_model_and_batches_may_be_given_as_they_are(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    import lowrank_fx
    from lowrank_fx.storage import read_plan

    arguments = f"optimize {zoo}:model --data {zoo}:batches --skip 0 --keep-flops 0.9 --no-compile --no-progress"
    assert main([*arguments.split(), "--out", "out"]) == 0
    plan, _ = read_plan("out")
    assert plan.target == lowrank_fx.Keep(flops=0.9)
    assert [site.name for site in plan.factored] == ["2"]
    assert [entry.name for entry in plan.left_alone] == ["0"]
    assert "skipped by the pattern '0'" in capsys.readouterr().out


def test_a_metric_is_a_function_of_a_module(
    zoo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_fx import module
    from lowrank_fx.latency import PairedTiming
    from lowrank_fx.storage import read_plan

    monkeypatch.setattr(module, "measure", lambda *_: PairedTiming(1.2, 1.0, 1 / 1.2, 0.0, 7))
    arguments = f"optimize {zoo}:model --data {zoo}:batches --metric {zoo}:likeness --max-drop 0.3 --no-compile"
    assert main([*arguments.split(), "--no-progress", "--out", "out"]) == 0
    said = capsys.readouterr().out
    plan, _ = read_plan("out")
    assert plan.metric is not None
    assert plan.metric.before == pytest.approx(1.0, abs=1e-5)  # float32
    assert 0.7 - 1e-5 <= plan.metric.after < 1.0
    assert said.startswith("lowrank_fx: Metric(likeness, max_drop=0.3)\n")
    assert f"evaluated {plan.metric.evaluations} times of at most 12" in " ".join(said.split())
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == said


def test_a_loss_is_kl_or_a_function_of_a_module(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lowrank_fx.storage import read_plan

    arguments = f"optimize {zoo}:model --data {zoo}:batches --keep-flops 0.7 --no-compile --no-progress --out out"
    for loss, name in (("kl", "the Kullback-Leibler divergence"), (f"{zoo}:loss", "the loss 'loss'")):
        assert main([*arguments.split(), "--loss", loss]) == 0
        assert name in " ".join(capsys.readouterr().out.split())
        plan, _ = read_plan("out")
        assert any(name in note for note in plan.notes)
    assert main([*arguments.split(), "--loss", "entropy"]) == 2
    assert "--loss 'entropy'" in capsys.readouterr().err


def test_the_way_of_capture_is_passed_on(
    zoo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def optimize(*_: object, capture: str, **__: object) -> None:
        given.append(capture)
        raise LowRankError("enough")

    monkeypatch.setattr("lowrank_fx.pipeline.optimize", optimize)
    for options in ([], ["--capture", "modules"]):
        assert fails(capsys, "optimize", f"{zoo}:model", "--data", f"{zoo}:batches", "--out", "o", *options)[0] == 2
    assert given == ["auto", "modules"]


# ---- compare ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(zoo: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The name of the module whose model was optimized into the folder ``out``."""
    arguments = f"optimize {zoo}:make_model --data {zoo}:make_loader --keep-params 0.5 --of sites --no-compile"
    assert main([*arguments.split(), "--no-progress", "--out", "out"]) == 0
    capsys.readouterr()
    return zoo


def compares(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a comparison prints, without the line of its speed."""
    assert main(["compare", "out", "--no-compile", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return "\n".join(line for line in captured.out.splitlines() if "as fast" not in line)


def test_compare_needs_nothing_but_the_folder(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = compares(capsys, "--html", "page.html")
    assert "160 rows in 10 batches" in said
    assert "float32 16 x 32" in said
    assert "These are the batches it was calibrated on; give --data others" in said
    assert said.endswith("\npage.html shows this as a page.")
    assert "Original against optimized" in Path("page.html").read_text("utf-8")


def test_frozen_reaches_both_models(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "out", "--frozen"]) == 0
    assert "both compiled with frozen weights" in " ".join(capsys.readouterr().out.split())
    code, said = fails(capsys, "compare", "out", "--frozen", "--no-compile")
    assert code == 2
    assert said.startswith("--frozen says how the models are compiled; leave out --no-compile")


def test_compare_takes_another_model_and_fresh_batches(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = compares(capsys, "--model", f"{saved}:model", "--data", f"{saved}:fresh")
    assert "48 rows in 3 batches" in said
    assert "calibrated on" not in said


def test_compare_names_the_option_where_nothing_is_recorded(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out/origin.json").unlink()
    options: list[str] = []
    for option, value in (("--model MODULE:FACTORY", "model"), ("--data MODULE:LOADER", "fresh")):
        code, said = fails(capsys, "compare", "out", *options)
        assert (code, said) == (2, f"out has no origin.json that says what it was made from; give {option}")
        options += [option.split()[0], f"{saved}:{value}"]
    assert "48 rows in 3 batches" in compares(capsys, *options)


def test_compare_names_the_option_where_the_name_means_nothing(
    saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("out").absolute()
    origin = folder / "origin.json"
    text = origin.read_text("utf-8")
    origin.write_text(text.replace(f"{saved}:make_model", "gone:make_model"), "utf-8")
    code, said = fails(capsys, "compare", "out")
    assert code == 2
    assert said.startswith("out/origin.json: model 'gone:make_model': no module 'gone' is in ")
    assert said.endswith("; run this where DIR was made, or give --model MODULE:FACTORY")
    origin.write_text(text.replace(f"{saved}:make_loader", f"{saved}:gone"), "utf-8")
    code, said = fails(capsys, "compare", "out")
    assert code == 2
    assert said == (
        f"out/origin.json: data '{saved}:gone': module '{saved}' has nothing called 'gone'; "
        "run this where DIR was made, or give --data MODULE:LOADER"
    )


def test_compare_refuses_a_model_with_other_weights(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fails(capsys, "compare", "out", "--model", f"{saved}:make_other")
    assert code == 2
    assert "has other values than the weights the plan was made for" in said


# ---- export ----------------------------------------------------------------------------------------------------------


def test_export_writes_every_format_that_is_named(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"onnx": "m.onnx", "pt2": "m.pt2", "torchscript": "m.pt"}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    assert main(["export", "out", *options, "--fold", "--data", f"{saved}:fresh"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(files.values())
    assert all(line.endswith("(relative L2; batch sizes 4 and 5; the given example)") for line in lines)
    assert [file for file in files.values() if not Path(file).is_file()] == []


def test_export_says_what_it_misses(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "out", "--pt2", "m.pt2"]) == 0
    assert "random values in the shapes of the captured example" in capsys.readouterr().out
    assert fails(capsys, "export", "out", "--onnx", "no/m.onnx") == (
        2,
        "no/m.onnx cannot be written: No such file or directory",
    )
    Path("out/origin.json").unlink()
    code, said = fails(capsys, "export", "out", "--pt2", "n.pt2")
    assert (code, said) == (
        2,
        "out has no origin.json that says what it was made from; give --model MODULE:FACTORY",
    )
    assert main(["export", "out", "--pt2", "n.pt2", "--model", f"{saved}:model"]) == 0
