"""The second verdict: a loss planted in a model that learned a text, against figures by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.evaluation import built_in, make_evaluation
from llama_onnx.exporter.parity.measure.prompts import TEXTS, encode
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.parity.report.page import render
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.fidelity import Fidelity
from llama_onnx.runtime.measure.situations import WHOLE
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.targets import cpu
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.providers import CPU
from tests.support import bigram, tiny
from tests.support.faults import edit
from tests.support.packages import renew_hashes
from tests.support.parity import Make, report_on

OUTLIER = 3.0
QUICK = ("--tokens", 2, "--prompt-tokens", 4)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the text, and the same with outliers; packages of both."""
    root = tmp_path_factory.mktemp("learned ä 日本")
    tiny.write_huggingface(root / "plain", tensors=bigram.learned())
    tiny.write_huggingface(root / "spiky", tensors=bigram.with_outliers(OUTLIER))
    for source, precision in (("plain", "fp32"), ("spiky", "int4"), ("spiky", "int8")):
        out = root / f"{source}-{precision}"
        quantizer = None if precision == "fp32" else "rtn"
        export_package(root / source, out, cpu.TARGET, Options(precision, quantizer=quantizer))
    return root


def measured(package: Path, source: Path, **options: object) -> Fidelity:
    evaluation = make_evaluation(package, bigram.CONFIG)
    report = report_on(package, source, 2, 4, evaluation=evaluation, situations=WHOLE, **options)
    assert report.fidelity
    return report.fidelity


# A planted loss


@pytest.mark.parametrize(
    ("sharper", "kl", "word"),
    [
        (0.05, 0.0032, "indistinguishable"),
        (0.1, 0.0124, "very close"),
        (0.2, 0.0469, "close"),
        (0.4, 0.167, "noticeably different"),
        (0.7, 0.439, "another model"),
    ],
)
def test_a_planted_loss_gets_its_grade(
    root: Path, tmp_path: Path, sharper: float, kl: float, word: str
) -> None:
    """A head that is larger by a factor makes the model surer: the likeliest token stays."""
    package = Path(shutil.copytree(root / "plain-fp32", tmp_path / "package"))

    def grow(head: np.ndarray) -> None:
        head *= np.float32(1 + sharper)

    edit(package, "lm_head.weight", grow)
    found = measured(package, root / "plain")
    original = bigram.logits(*head_of(bigram.learned()))
    by_hand = bigram.losses(bigram.passages(root / "plain"), original, original * (1 + sharper))
    assert by_hand["mean_kl"] == pytest.approx(kl, rel=0.02)
    for lost in (found.shipped, found.weights):
        assert lost.positions == 4 * bigram.LENGTH
        assert lost.mean_kl == pytest.approx(by_hand["mean_kl"], rel=1e-4)
        assert lost.perplexity_ratio == pytest.approx(by_hand["perplexity_ratio"], rel=1e-4)
        assert lost.other_top1 == 0
    assert found.original_perplexity == pytest.approx(by_hand["perplexity"], rel=1e-4)
    assert found.trained and found.grade == word


def head_of(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]


# Rounding that is exact, and spoils the model


def test_what_rounding_costs_is_not_a_fault_of_conversion(root: Path) -> None:
    result = run("validate", root / "spiky-int4", "--reference", root / "spiky", *QUICK)
    assert result.exit_code == 1
    *_, conversion, fidelity, beyond, advice = result.stdout.splitlines()
    assert conversion == "conversion passed: every threshold holds."
    assert fidelity.startswith("fidelity   another model: mean KL 0.")
    assert " ± " in fidelity and "of 1,024 positions" in fidelity
    assert beyond.strip().startswith("beyond the limits of int4 rtn: mean KL 0.")
    for limit in ("limit 0.2;", "likeliest tokens 0.", "limit 0.27;", "ratio 1.", "limit 1.2 ("):
        assert limit in beyond
    assert "(measured: rounding to nearest may be used where" in beyond
    assert "`--precision int8`" in advice


def test_the_figures_are_those_of_rounding_by_hand(root: Path) -> None:
    found = measured(root / "spiky-int4", root / "spiky")
    embedding, head = head_of(bigram.with_outliers(OUTLIER))
    blocks = head.reshape(len(head), -1, 32)
    step = np.abs(blocks).max(axis=2, keepdims=True) / 8  # the outlier, positive, becomes -8 steps
    rounded = (np.clip(np.round(blocks / -step), -8, 7) * -step).reshape(head.shape)
    by_hand = bigram.losses(
        bigram.passages(root / "spiky"),
        bigram.logits(embedding, head),
        bigram.logits(embedding, rounded),
    )
    # The embedding is rounded too, to eight bits, and so are the activations.
    assert found.weights.mean_kl == pytest.approx(by_hand["mean_kl"], rel=0.05)
    assert found.shipped.mean_kl == pytest.approx(by_hand["mean_kl"], rel=0.05)
    assert found.shipped.other_top1 == pytest.approx(by_hand["other_top1"], abs=0.05)


def test_a_precision_that_suits_the_model_passes(root: Path) -> None:
    result = run("validate", root / "spiky-int8", "--reference", root / "spiky", *QUICK)
    assert result.exit_code == 0, result.output
    assert "\nfidelity   indistinguishable: mean KL 0.00" in result.stdout
    assert result.stdout.endswith("within the limits of int8.\n")


def test_json_has_both_verdicts(root: Path) -> None:
    result = run("validate", root / "spiky-int4", "--reference", root / "spiky", *QUICK, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["passed"] is True and content["conversion"] == {"passed": True}
    fidelity = content["fidelity"]
    assert (fidelity["grade"], fidelity["passed"], fidelity["trained"]) == (
        "another model",
        False,
        True,
    )
    assert (fidelity["recipe"], fidelity["text"]) == ("int4 rtn", "built-in")
    assert {limit["metric"]: limit["passed"] for limit in fidelity["limits"]} == {
        "mean_kl": False,
        "other_top1": False,
        "perplexity_ratio": False,
    }
    assert all(row["figures"]["mean_kl_error"] >= 0 for row in content["measurements"])


def test_a_loss_is_certified_only_if_accepted_and_everybody_repeats_it(
    root: Path, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(root / "spiky-int4", tmp_path / "package"))
    arguments = ("validate", package, "--reference", root / "spiky", *QUICK, "--certify")
    refused = run(*arguments)
    assert refused.exit_code == 1 and not (package / "parity").exists()
    accepted = run(*arguments, "--accept-loss")
    assert accepted.exit_code == 0, accepted.output
    assert "the loss is accepted." in accepted.stdout
    assert (package / "parity").exists()

    verified = verify(package, CPU)
    assert verified.passed and verified.fidelity
    assert verified.fidelity.grade == "another model" and verified.fidelity.accepted
    assert verified.to_json()["fidelity"]["claimed"] is True
    printed = run("verify", package)
    assert (
        "fidelity   the certificate claims, not measured here: another model: mean KL 0."
        in printed.stdout
    )
    assert "; beyond the limits of int4 rtn" in printed.stdout

    from llama_onnx.runtime.bundles.card import _parity
    from llama_onnx.runtime.measure.certificate import read_certificate
    from llama_onnx.targets.package import ModelPackage

    card = "\n".join(_parity(ModelPackage.open(package), read_certificate(package)))
    assert "**Fidelity to the original: another model.** On 1,024 positions" in card
    assert "beyond the limits of the recipe `int4 rtn`" in card


def test_export_proves_both(root: Path, tmp_path: Path) -> None:
    rounded = ("--quantizer", "rtn")
    arguments = ("export", root / "spiky", tmp_path / "out", *rounded, "--prove", "--json")
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "loses more than its recipe may (another model)" in refused.stderr
    assert not (tmp_path / "out" / "parity").exists()
    accepted = run(*arguments, "--force", "--accept-loss")
    assert accepted.exit_code == 0, accepted.output
    parity = json.loads(accepted.stdout)["parity"]
    assert parity["passed"] is True and parity["fidelity"]["accepted"] is True
    assert (tmp_path / "out" / "parity").exists()
    alone = run("export", root / "spiky", tmp_path / "other", "--accept-loss")
    assert alone.exit_code == 2 and "pass --prove too" in alone.stderr


def test_a_damaged_claim_is_refused(root: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(root / "spiky-int8", tmp_path / "package"))
    source = open_checkpoint(root / "spiky")
    assert prove(package, source, tokens=2, longest=4, certify=True).accepted
    file = package / "parity" / "certificate.json"
    content = json.loads(file.read_text("utf-8"))
    content["validated"]["fidelity"]["recipe"] = "flawless"
    file.write_text(json.dumps(content), "utf-8")
    renew_hashes(package)
    with pytest.raises(PackageError, match=r"certificate\.json is damaged: an entry has the wrong"):
        verify(package, CPU)
    del content["validated"]["fidelity"]  # as certificates of 0.1 are
    file.write_text(json.dumps(content), "utf-8")
    renew_hashes(package)
    earlier = verify(package, CPU)
    assert earlier.passed and earlier.fidelity is None


def test_the_page_shows_both_verdicts(root: Path) -> None:
    report = prove(root / "spiky-int4", open_checkpoint(root / "spiky"), tokens=2, longest=4)
    assert report.passed and not report.accepted
    page = render(report)
    assert "<title>Passed; another model: parity of spiky-int4</title>" in page
    assert '<div class="verdict good">\n<strong>Conversion: passed</strong>' in page
    assert '<div class="verdict bad">\n<strong>Fidelity: another model</strong>' in page
    assert "Fidelity to the original</h2>" in page


# Random weights


def test_random_weights_are_graded_and_never_fail(made: Make) -> None:
    package, source = made("int4")
    found = measured(package, source)
    uniform = bigram.CONFIG.vocab_size
    assert found.original_perplexity > uniform  # and a guess would be right at one in so many
    assert not found.trained and found.limits == ()
    assert found.passed and found.grade in ("close", "noticeably different", "another model")
    result = run("validate", package, "--reference", source, *QUICK)
    assert result.exit_code == 0
    assert "there are 288 tokens, so it has not learned this text" in result.stdout


# The text


def test_the_built_in_text_fills_every_passage(root: Path) -> None:
    found = make_evaluation(root / "plain-fp32", bigram.CONFIG)
    assert found and found.text == "built-in" and len(built_in()) == 4
    expected = bigram.passages(root / "plain")
    assert [ids.tolist() for ids in found.sequences] == [ids.tolist() for ids in expected]
    # Every tokenizer: a word is at least one token.
    assert all(len(text.split()) > 220 for text in built_in())


def test_a_text_of_the_users_is_read_from_its_beginning(root: Path) -> None:
    package = root / "plain-fp32"
    text = "It rained for a week, and nobody went out. " * 60
    found = make_evaluation(package, bigram.CONFIG, (text,))
    assert found and found.text == "own"
    (ids,) = encode(package, (text,))
    assert np.concatenate(found.sequences).tolist() == ids[:1024].tolist()
    short = make_evaluation(package, bigram.CONFIG, ("Too short.",))
    assert short and short.text == "built-in"
    assert make_evaluation(package, bigram.CONFIG, TEXTS) is not None


def test_every_piece_of_a_text_begins_with_the_token_that_begins_a_text(
    root: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, processors

    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(root / "plain" / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(file))
    found = make_evaluation(tmp_path, bigram.CONFIG, ("It rained for a week. " * 100,))
    assert found and len(found.sequences) > 2
    assert all(ids[0] == 1 and (ids[1:] != 1).all() for ids in found.sequences)


def test_without_a_tokenizer_fidelity_is_not_measured(tmp_path: Path) -> None:
    assert make_evaluation(tmp_path, bigram.CONFIG) is None


def test_a_graph_with_logits_of_the_last_position_is_measured_everywhere(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "last"
    export_package(root / "plain", out, cpu.TARGET, Options("fp32", logits="last"))
    found = measured(out, root / "plain")
    assert found.shipped.positions == found.weights.positions == 4 * bigram.LENGTH
    assert found.shipped.mean_kl < 1e-6


def test_a_limit_that_was_asked_for_cannot_be_lifted(root: Path) -> None:
    limit = ("--max-kl", 1e-9, "--accept-loss")
    result = run("validate", root / "spiky-int8", "--reference", root / "spiky", *QUICK, *limit)
    assert result.exit_code == 1
    assert "beyond the limit asked for: mean KL 0.00" in result.stdout
    assert "the loss is accepted" not in result.stdout
