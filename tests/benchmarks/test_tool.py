"""tools/benchmark.py: every subcommand in its quick form, the page, and what is refused."""

import json

import pytest
import torch

from benchmarks import SECTIONS, command, gpu, layer, measure_section, parallel, reference, training
from benchmarks.interleave import Skip, Task
from benchmarks.ops import farthest_from
from benchmarks.presets import PUBLIC_BERT
from benchmarks.reference import load_reference
from benchmarks.report import MARK, merge_results, read_results, report, target_table, write_results
from benchmarks.section import Measure, Section, Settings, new_section
from benchmarks.targets import AT_MOST, TARGETS, Target, judge
from benchmarks.training import build_inference, build_model, build_step, expert_bytes, without_dropping
from s2d3d.errors import InputError

TINY = PUBLIC_BERT.quick
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(tool, capsys):
    def call(*arguments):
        code = tool("benchmark").main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def everything(tmp_path_factory, request):
    """`all --quick`, once: its page, its numbers and its standard output.

    Contestants run in this process, but for memory and ranks; test_worker.py has them in others.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    from _pytest.capture import MultiCapture, SysCapture

    path = request.config.rootpath / "tools" / "benchmark.py"
    spec = spec_from_file_location("tools_benchmark_all", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    page = tmp_path_factory.mktemp("page") / "benchmarks.md"
    arguments = ["all", "--quick", "--rounds", "1", "--threads", "1", "--device", "cpu", "--output", str(page)]
    patch = pytest.MonkeyPatch()
    patch.setattr(Settings, "apart", Settings.here)
    capture = MultiCapture(in_=None, out=SysCapture(1), err=SysCapture(2))
    capture.start_capturing()
    try:
        code = module.main(arguments)
    finally:
        out, err = capture.readouterr()
        capture.stop_capturing()
        patch.undo()
    assert code == 0, err
    return page, out


@pytest.fixture(scope="module")
def sections(everything) -> dict[str, Section]:
    return {section.name: section for section in read_results(everything[0].with_suffix(".json"))}


@pytest.mark.slow
def test_every_section_is_measured_and_shown(everything, sections):
    page, out = everything
    text = page.read_text()
    assert [*sections, "gpu"] == list(SECTIONS), "the last one is for a GPU"
    for section in sections.values():
        assert f"(`{section.name}`)" in text
        for comparison in section.comparisons:
            assert f"**{comparison.title}**" in text and f"**{comparison.title}**" in out
            assert comparison.base in comparison.times
    assert MARK in text and "The numbers mean nothing" in text


@pytest.mark.slow
def test_equal_mathematics_is_equal(sections):
    """Every contestant that is not marked as another computation was compared, and is close."""
    compared = 0
    for name in ("layer", "step", "ops", "inference"):
        for comparison in sections[name].comparisons:
            for contestant, distance in comparison.deviations.items():
                if distance is not None:
                    allowed = training.BF16_TOLERANCE if contestant.endswith("bf16") else comparison.tolerance
                    assert distance <= allowed, (comparison.name, contestant)
                    compared += 1
    assert compared > 20
    step, sparse = (
        next(c for c in sections["step"].comparisons if c.name == f"point_bert step{form}") for form in ("", ", S2D")
    )
    assert step.base == "reference, as users run it"
    assert 0 < step.deviations["ours, dense"] < 1e-4 and step.deviations["reference, our allocator"] == 0
    assert sparse.base == "ours, dense" and 0 < sparse.deviations["ours, S2D"] < 1e-4
    routed = [name for name, note in sections["layer"].comparisons[0].notes.items() if note.startswith("routed")]
    assert len(routed) >= 2 and all(sections["layer"].comparisons[0].deviations[name] is None for name in routed)


@pytest.mark.slow
def test_every_target_is_decided_by_a_measure_that_exists(everything, sections):
    """A target whose key nobody measures would be "not measured" for ever, and no one would notice."""
    measures = {key: measure for section in sections.values() for key, measure in section.measures.items()}
    text = everything[0].read_text()
    for target in TARGETS:
        verdict = judge(target, measures)
        assert target.title in text and verdict.measured in text
        if target.key.startswith("cpu."):
            assert target.key in measures, target.key
            assert "(not measured)" not in verdict.why or "bf16" in target.key
        else:
            assert verdict.measured == "not measured: no GPU was at hand"


@pytest.mark.slow
def test_series_have_exponents_and_ranks_scale(sections):
    series = sections["scale"].series
    assert [one.expected for one in series if one.name in ("tokens", "experts", "width", "batch")] == [1, 0, 2, 1]
    assert all(len(one.seconds) == len(one.sizes) and min(one.seconds) > 0 for one in series)
    assert sections["scale"].measures["cpu.scale.weak_scaling_efficiency"].reason == "needs 2 threads"
    scaling = parallel.weak_scaling(Settings(CPU, 2, rounds=12), TINY.but(experts=4))  # not quick: started anew
    assert all(len(seconds) > 1 and min(seconds) > 0 for seconds in scaling.times.values()) and len(scaling.times) == 2
    plan = {key.removeprefix("cpu.scale.plan."): m.value for key, m in sections["scale"].measures.items()}
    assert plan["dense.state_mib"] == pytest.approx(4 * plan["dense.exchanged_mib"])
    assert plan["s2d.exchanged_mib"] > plan["dense.exchanged_mib"]


@pytest.mark.slow
def test_page_again_from_its_numbers(everything, benchmark, tmp_path):
    page, _ = everything
    numbers = page.with_suffix(".json")
    again = tmp_path / "again.md"
    code, out, err = benchmark("report", numbers, "--output", again)
    assert (code, err) == (0, "") and "written to" in out
    assert again.read_text().split("\n## Targets")[1] == page.read_text().split("\n## Targets")[1]
    assert json.loads(again.with_suffix(".json").read_text()) == json.loads(numbers.read_text())
    assert benchmark("report", numbers, "--output", again)[0] == 0, "a page of the tool may be made anew"
    again.write_text("mine")
    code, _, err = benchmark("report", numbers, "--output", again)
    assert code == 1 and "exists already" in err and again.read_text() == "mine"


def test_one_section_with_output(benchmark, tmp_path):
    output = tmp_path / "layer.json"
    code, out, err = benchmark("layer", "--quick", "--rounds", 1, "--device", "cpu", "--output", output)
    assert code == 0, err
    assert "| dense FFN" in out and "processor:" in out and "allocator:" in out and f"written to {output}" in out
    (section,) = read_results(output)
    assert section.settings["rounds"] == 1 and {len(times) for times in section.comparisons[0].times.values()} == {1}
    code, _, err = benchmark("layer", "--quick", "--output", output)
    assert code == 1 and "exists already" in err


def test_other_results_are_refused_in_one_line(benchmark, monkeypatch):
    class Wrong(layer.LoopMoF):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setattr(layer, "LoopMoF", Wrong)
    code, out, err = benchmark("layer", "--quick", "--device", "cpu")
    line = err.splitlines()[-1]
    assert code == 1 and out == "" and "Traceback" not in err
    assert line.startswith("error: layer: results of 'loop over experts' differ from those of 'dense FFN' by")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--rounds", "0"], "--rounds is 0, must be at least 1"),
        (["layer", "--resolve", "1.5"], "--resolve is 1.5, must be between 0 and 1, such as 0.01"),
        (["layer", "--budget", "0"], "--budget is 0.0, must be greater than 0"),
        (["layer", "--threads", "0"], "--threads is 0, must be at least 1"),
        (["data", "--root", "nowhere"], "nowhere: holds no train_files.txt"),
        (["layer", "--device", "tpu"], "device 'tpu' is unknown"),
        (["all", "--output", "x.json"], "x.json: is the name of the numbers; name the page"),
        (["report", "nothing.json", "--output", "x.md"], "nothing.json: no such file; results are made by"),
        (["report", "pyproject.toml", "--output", "/tmp/x.md"], "pyproject.toml: not a JSON file"),
    ],
)
def test_bad_arguments(benchmark, arguments, message, monkeypatch, repository):
    monkeypatch.chdir(repository)
    code, out, err = benchmark(*arguments)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1


def section(name, device, value, **hardware):
    made = new_section(name, name.title(), Settings(CPU, 1))
    made.hardware |= {"device": device, **hardware}
    made.add("x", value)
    return made


def test_later_results_of_a_section_replace_earlier_ones():
    one, other = section("step", "cpu", 1.0), section("step", "cuda", 2.0)
    merged = merge_results([[one, other], [section("step", "cpu", 3.0)]])
    assert [(s.device, *s.measures.values()) for s in merged] == [("cuda", Measure(2.0)), ("cpu", Measure(3.0))]
    assert Section.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_results_of_several_machines_stand_side_by_side():
    """Another instruction set, or another number of threads, is another machine."""
    listed = [
        section("step", "cpu", 1.0, cpu_flags=["avx2"]),
        section("step", "cpu", 2.0, cpu_flags=["avx2", "avx512f"]),
        section("step", "cpu", 3.0, cpu_flags=["avx2"], num_threads=2),
    ]
    merged = merge_results([listed, [section("step", "cpu", 4.0, cpu_flags=["avx2", "avx512f"])]])
    assert [s.measures["cpu.step.x"].value for s in merged] == [1.0, 3.0, 4.0]
    target = Target("cpu.step.x", "the step", AT_MOST, 3.5, why="because of {cpu.step.x:.0f}")
    text = target_table(merged, [target])
    (row,) = [line for line in text.splitlines() if line.startswith("| the step | at")]
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["1.00x, hit", "3.00x, hit", "4.00x, missed"]
    assert "- Machine C: " in text and "avx2 avx512f" in text and "14 % short of the bound; because of 4" in text
    page = report(merged, "made so")
    assert page.count("## Step (`step`)") == 1 and page.count("**Machine B**") == 1


def test_measuring_again_keeps_the_results_of_other_machines(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SECTIONS", {"layer": ""})
    value = iter([2.0, 3.0])
    monkeypatch.setattr(command, "measure_section", lambda name, settings: section(name, "cpu", next(value)))
    page = tmp_path / "page.md"
    other = section("layer", "cpu", 1.0, cpu_flags=["sve"])
    assert benchmark("all", "--output", page)[0] == 0
    write_results(page.with_suffix(".json"), [other, *read_results(page.with_suffix(".json"))])
    assert benchmark("all", "--output", page)[0] == 0
    kept = read_results(page.with_suffix(".json"))
    assert [s.measures["cpu.layer.x"].value for s in kept] == [1.0, 3.0]
    assert kept[0].hardware["cpu_flags"] == ["sve"] and page.read_text().count("**Machine B**") == 1


def test_a_page_keeps_what_it_holds(benchmark, tmp_path):
    """Results are added to a page; it begins anew with --force; --quick never replaces measured results."""
    page, numbers, added = tmp_path / "page.md", tmp_path / "page.json", tmp_path / "added.json"
    write_results(added, [section("layer", "cpu", 1.0)])
    assert benchmark("report", added, "--output", page)[0] == 0
    write_results(added, [section("step", "cpu", 2.0)])
    assert benchmark("report", added, "--output", page)[0] == 0
    assert [one.name for one in read_results(numbers)] == ["layer", "step"]
    quick = section("step", "cpu", 3.0)
    quick.settings["quick"] = True
    write_results(added, [quick])
    before = numbers.read_bytes()
    code, _, err = benchmark("report", added, "--output", page)
    assert code == 1 and "step: --quick would replace measured results" in err and numbers.read_bytes() == before
    assert benchmark("report", added, "--output", page, "--force")[0] == 0
    assert [one.name for one in read_results(numbers)] == ["step"]


@pytest.mark.parametrize("broken", ["packages", "load_average", "sections"])
def test_damaged_results_are_refused(benchmark, tmp_path, broken):
    damaged, page = section("layer", "cpu", 1.0), tmp_path / "page.md"
    damaged.hardware.pop(broken, None)
    damaged.settings.pop(broken, None)
    write_results(tmp_path / "results.json", [] if broken == "sections" else [damaged])
    code, _, err = benchmark("report", tmp_path / "results.json", "--output", page)
    assert code == 1 and "results.json: " in err and err.count("\n") == 1 and not page.exists()


@pytest.mark.parametrize(("threads", "batch", "ranks"), [(4, 6, 3), (8, 2, 2), (3, 32, 2), (2, 7, 1)])
def test_ranks_divide_a_batch(monkeypatch, threads, batch, ranks):
    monkeypatch.setattr(parallel, "interleave", lambda name, contestants, **options: options)
    assert parallel.all_cores(Settings(CPU, threads), TINY.but(batch=batch))["samples"] == ranks * batch


# What is timed is what it is said to be


def test_contestants_of_a_step_are_what_they_are_called():
    dense, sparse = build_model(TINY), build_model(TINY.but(experts=4))
    extra = [sum(p.numel() for p in model.parameters()) for model in (sparse, dense)]
    assert expert_bytes(TINY.but(experts=4)) == 4 * 4 * (extra[0] - extra[1]) > 0
    merged = build_model(TINY.but(experts=4, merged=True))
    assert merged.state_dict().keys() == dense.state_dict().keys()
    folded = build_model(TINY.but(folded=True))
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in folded.encoder.modules())
    reference = build_model(TINY.but(source="reference"))
    assert type(reference).__module__ == "s2d3d_reference.point_bert"
    for key, tensor in reference.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[key]), key


def test_a_step_trains_every_parameter_and_brings_experts_together():
    for spec in (TINY, TINY.but(experts=2), TINY.but(source="reference", fused=False), TINY.but(precision="bf16")):
        losses = []
        task = build_step(spec)
        losses = [float(task.run()) for _ in range(12)]
        assert losses[-1] < 0.7 * losses[0], spec
    assert (build_inference(TINY).outputs()[0] - build_inference(TINY).run()).abs().max() == 0


def test_nothing_is_dropped_while_results_are_compared():
    for spec in (TINY.but(kwargs={**TINY.kwargs, "drop_path_rate": 0.5}), TINY.but(source="reference")):
        model = build_model(spec).train()
        points, _ = training.clouds(2, 32)
        before = [(m, vars(m).copy()) for m in model.modules()]
        with without_dropping(model):
            assert torch.equal(model(points), model(points))
        assert not torch.equal(model(points), model(points)), "and dropped again behind it"
        for module, attributes in before:
            assert all(vars(module)[key] is value for key, value in attributes.items() if isinstance(value, float))


def test_without_the_repository_the_baselines_say_so(tmp_path):
    with pytest.raises(Skip, match="tests/reference is missing: the baselines need a clone of the repository"):
        load_reference(tmp_path / "tests" / "reference")


def test_without_baselines_the_rest_is_measured(monkeypatch):
    def missing():
        raise Skip("tests/reference is missing")

    monkeypatch.setattr(reference, "load_reference", missing)
    monkeypatch.setattr(Settings, "apart", Settings.here)
    section = measure_section("inference", Settings(CPU, 1, rounds=1, quick=True))
    measures = {key.removeprefix("cpu.inference."): measure for key, measure in section.measures.items()}
    assert measures["point_bert.A"] == Measure(reason="tests/reference is missing")
    assert measures["point_bert.limit_B"] == Measure(reason="tests/reference is missing")
    assert measures["point_bert.merged"].value > 0
    assert section.comparisons[0].base == "ours, dense"
    assert section.comparisons[0].deviations["ours, merged"] <= 1e-6, "weights are equal all the same"


def test_farthest_points_from_any_start_are_those_of_a_loop():
    xyz, start = torch.rand(3, 40, 3), torch.tensor([0, 7, 39])
    found = farthest_from(xyz, start, 6)
    for cloud, first, indices in zip(xyz, start.tolist(), found.tolist()):
        chosen = [first]
        while len(chosen) < 6:
            chosen.append(int(torch.cdist(cloud, cloud[chosen]).amin(1).argmax()))
        assert indices == chosen


@pytest.mark.slow
def test_targets_of_a_gpu_name_what_is_measured_there(monkeypatch):
    """Without a GPU: nothing is compiled or recorded, and seeds run one after another."""

    def one_after_another(spec, count=1):
        steps = [build_step(spec.but(seed=seed)) for seed in range(count)]
        return Task(lambda: [step.run() for step in steps], steps[0].outputs)

    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    monkeypatch.setattr(gpu, "build_seeds", one_after_another)
    monkeypatch.setattr(gpu, "build_recorded", one_after_another)
    monkeypatch.setattr(Settings, "apart", Settings.here)
    settings = Settings(CPU, 1, rounds=1, quick=True)
    section = new_section("gpu", "Training on a GPU", settings)
    section.hardware["device"] = "cuda"
    gpu.measure_throughput(section, settings, TINY)
    targets = [target for target in TARGETS if target.key.startswith("cuda.")]
    assert len(targets) == 2
    for target in targets:
        verdict = judge(target, section.measures)
        assert verdict.state != "not measured" and "(not measured)" not in verdict.why


def test_the_section_of_a_gpu_needs_one():
    with pytest.raises(InputError, match=r"^gpu: needs a CUDA device, the device is 'cpu'; other sections run here$"):
        measure_section("gpu", Settings(CPU, 1))


@pytest.mark.slow  # a process that imports everything
def test_the_memory_of_reading_is_that_of_the_reader(tmp_path):
    """Not what the process had that started it: from a process of some size it came out as 0."""
    from benchmarks.files import memory_taken

    kept, path = bytearray(2**28), tmp_path / "table.csv"
    path.write_text("1.25,2.5,3.75\n0.5,1.25,2.5\n" * 500_000)
    assert 24 * 10**6 < memory_taken(path) < len(kept)
