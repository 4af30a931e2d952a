"""A real model as an ONNX file: the sentence encoder of the demo."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx_models import computed
from torch.export import Dim

from lowrank_fx import Keep, onnx_compress
from lowrank_fx.demo.encoder import demo_sentences, load_encoder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_a_sentence_encoder(tmp_path: Path) -> None:
    model, tokenizer = load_encoder()
    sentences = demo_sentences()[0]
    rows = [sentences[start : start + 16] for start in range(0, 96, 16)]
    options = {"padding": True, "truncation": True, "max_length": 16, "return_tensors": "pt"}
    data = [
        {key: value for key, value in tokenizer(each, **options).items() if key != "token_type_ids"} for each in rows
    ]
    sizes = {0: Dim("batch"), 1: Dim("tokens")}
    program = torch.onnx.export(
        model, (), kwargs=data[0], dynamo=True, dynamic_shapes=dict.fromkeys(data[0], sizes), verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "in.onnx"))
    # Every trial runs the whole model, so one of its six blocks has to do.
    target, skip = Keep(params=0.7, of="sites"), ["*layer.[0-4].*"]
    made = onnx_compress(tmp_path / "in.onnx", tmp_path / "out.onnx", data, target, skip=skip, progress=False)

    block = "transformer.encoder.layer.5"
    names = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    names += ["intermediate.dense", "output.dense"]
    assert [site.name for site in made.plan.sites] == [f"{block}.{name}" for name in names]
    assert "gradient" in {site.basis for site in made.plan.factored}
    assert made.error == pytest.approx(made.plan.error, rel=1e-3)
    assert made.plan.totals.kept("params", "sites") <= 0.7
    before, after = onnx.load_model(tmp_path / "in.onnx"), onnx.load_model(made.path)
    assert len(after.graph.node) == len(before.graph.node) + len(made.plan.factored)
    kept = {node.output[0]: node.SerializeToString() for node in before.graph.node}
    same = [node for node in after.graph.node if kept.get(node.output[0]) == node.SerializeToString()]
    assert len(same) == len(before.graph.node) - len(made.plan.factored)
    feeds = {name: tensor.numpy() for name, tensor in data[0].items()}
    own, original = computed(after, feeds)[0], computed(before, feeds)[0]
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(own), torch.from_numpy(original)).mean()
    assert cosine > 0.9
