"""Small random models of the architectures that people bring, with dead parts, and the table of what the slimmer does.

scripts/architectures writes docs/architectures.md from it; a test fails while the table is stale. With --all the second
table of the page is written, too, from more_architectures.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritprune.slimming import SlimResult, slim_model
from tritprune.slimming.attention import find_attention
from tritprune.slimming.feed_forward import FeedForward, find_feed_forward
from tritprune.slimming.graph import trace

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
IDS = torch.arange(16).view(2, 8) % 32
TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
PIXELS = {"pixel_values": torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).float().sin()}
IMAGE = PIXELS["pixel_values"]
SEQUENCE = torch.arange(2 * 8 * 16).view(2, 8, 16).float().sin()

BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 32}
LLAMA = {**BERT, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
GPT = {
    "vocab_size": 32,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "BERT": ("BertForSequenceClassification", BERT, TOKENS),
    "RoBERTa": ("RobertaForSequenceClassification", BERT, TOKENS),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32},
        TOKENS,
    ),
    "ALBERT": ("AlbertForSequenceClassification", {**BERT, "embedding_size": 8}, TOKENS),
    "ELECTRA": ("ElectraForSequenceClassification", {**BERT, "embedding_size": 8}, TOKENS),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4},
        PAIR,
    ),
    "T5 v1.1 (gated)": (
        "T5EncoderModel",
        {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
        | {"feed_forward_proj": "gated-gelu"},
        {"input_ids": IDS},
    ),
    "BART": (
        "BartForConditionalGeneration",
        {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
        PAIR,
    ),
    "GPT-2": ("GPT2LMHeadModel", GPT, {"input_ids": IDS}),
    "OPT": (
        "OPTForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "max_position_embeddings": 32},
        TOKENS,
    ),
    "GPT-J": ("GPTJForCausalLM", {**GPT, "n_head": 2, "rotary_dim": 4}, {"input_ids": IDS}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", LLAMA, {"input_ids": IDS}),
    "Llama": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 4}, {"input_ids": IDS}),
    "Llama, grouped queries": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 2}, {"input_ids": IDS}),
    "Mistral": ("MistralForCausalLM", {**LLAMA, "num_key_value_heads": 2}, {"input_ids": IDS}),
    "Qwen2": ("Qwen2ForCausalLM", {**LLAMA, "num_key_value_heads": 2}, {"input_ids": IDS}),
    "Phi-3": ("Phi3ForCausalLM", {**LLAMA, "num_key_value_heads": 2, "pad_token_id": 0}, {"input_ids": IDS}),
    "Mixtral": (
        "MixtralForCausalLM",
        {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4},
        {"input_ids": IDS},
    ),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        TOKENS,
    ),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 4}, TOKENS),
    "Falcon, one key head": (
        "FalconForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "multi_query": True},
        {"input_ids": IDS},
    ),
    "ViT": (
        "ViTForImageClassification",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        | {"image_size": 16, "patch_size": 4},
        PIXELS,
    ),
    "Swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        PIXELS,
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 4}
        | {"layer_scale_init_value": 0.5},
        PIXELS,
    ),
}


class BasicBlock(nn.Module):
    """ResNet's block: two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += shortcut
        return self.relu(x)


def resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks = (BasicBlock(8, 8, 1), BasicBlock(8, 8, 1), BasicBlock(8, 12, 2), BasicBlock(12, 12, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, one filter a channel, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    blocks = (InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class Mixer(nn.Module):
    """MLP-Mixer: one MLP across tokens, one across channels."""

    def __init__(self, tokens: int = 16, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.token_mlp = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.channel_mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.token_mlp(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channel_mlp(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


class FanOut(nn.Module):
    """A plain MLP whose hidden units are read twice and added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 10)
        self.left, self.right, self.out = nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))
        return self.out(torch.cat([torch.tanh(self.left(x)), F.gelu(self.right(x))], dim=-1))


class Einsum(nn.Module):
    """Attention written as equations."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*x.shape[:2], self.heads, -1) for y in (self.query(x), self.key(x), self.value(x)))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(2).softmax(-1)
        return x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class Recurrent(nn.Module):
    """A recurrent layer between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.rnn, self.out = nn.Linear(16, 12), nn.LSTM(12, 8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(torch.relu(self.up(x)))[0])


class UNet(nn.Module):
    """Down, up by transposed convolutions, what was there before beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = self.block(3, 8), self.block(8, 12), self.block(12, 16)
        self.widen2, self.widen1 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.up2, self.up1, self.head = self.block(24, 12), self.block(16, 8), nn.Conv2d(8, 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.widen2(self.middle(F.max_pool2d(two, 2)))
        y = self.widen1(self.up2(torch.cat([y, two], 1)))
        return self.head(self.up1(torch.cat([y, one], 1)))


PLAIN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "ResNet-18-like": (resnet, IMAGE),
    "MobileNet-like": (mobilenet, IMAGE),
    "nn.TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
        ),
        SEQUENCE,
    ),
    "attention by einsum": (Einsum, SEQUENCE),
    "LSTM": (Recurrent, SEQUENCE),
    "U-Net": (UNet, IMAGE),
    "MLP-Mixer": (Mixer, IMAGE),
    "MLP, residual and fan-out": (FanOut, torch.arange(18.0).view(3, 6).sin()),
}
NAMES = (*TRANSFORMERS, *PLAIN)


def build(name: str) -> tuple[nn.Module, Any]:
    """A model with weights large enough for every part to matter, and inputs for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in PLAIN:
            make, inputs = PLAIN[name]
            model = make()
        else:
            import transformers

            kind, settings, inputs = TRANSFORMERS[name]
            library_class = getattr(transformers, kind)
            model = library_class(library_class.config_class(**settings))
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not key.endswith("inv_freq"):
                norm = any(part in key.lower() for part in ("norm", "ln_", "bn", "running_var", "layer_scale"))
                nn.init.normal_(tensor, mean=1.0 if norm and "bias" not in key else 0.0, std=0.2 if norm else 0.3)
                if key.endswith("running_var"):
                    tensor.abs_().add_(0.5)
        return model.eval(), inputs


@torch.no_grad()
def damage(model: nn.Module, inputs: Any) -> None:
    """In every feed-forward block and attention some dead units and heads; in every convolution dead channels."""
    graph = trace(model, inputs)
    turned = {name: type(module).__name__ == "Conv1D" for name, module in model.named_modules()}

    def zero(name: str, index: Any, *, rows: bool) -> None:
        weight = model.get_submodule(name).weight
        weight[(slice(None), index) if rows == turned[name] else (index, slice(None))] = 0

    for block in find_feed_forward(graph, model):
        zero(block.root, [0, 3], rows=False)
        if block.root != "classifier":
            zero(block.root, [1], rows=True)
        if len(block.frontier) == 1:
            zero(block.frontier[0], [5], rows=True)
    for attention in find_attention(graph, model):
        if attention.output is not None:
            weight = model.get_submodule(attention.output).weight
            width = weight.shape[0 if turned[attention.output] else 1]
            zero(attention.output, slice(0, width // 2), rows=False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3:
            module.weight[:, 0] = 0
            module.weight[:, 2] = 0
        if isinstance(getattr(module, "down_proj", None), nn.Parameter):  # all experts in one tensor
            turned_experts = module.down_proj.shape[2] == model.config.hidden_size
            units = (slice(None),) * (1 if turned_experts else 2)
            module.down_proj[(*units, slice(4))] = 0
        if isinstance(module, Recurrent):
            module.rnn.weight_ih_l0[:, [0, 3]] = 0
            module.out.weight[:, 1] = 0
        if isinstance(module, FanOut):
            module.first.weight[[1, 2]] = 0
            module.second.weight[[1]] = 0
    if isinstance(model, nn.Sequential) and isinstance(model[-1], nn.Linear):
        model[-1].weight[:, [0, 2]] = 0


def slimmed(name: str, tracer: str = "jit") -> tuple[nn.Module, Any, SlimResult]:
    """The damaged model, its inputs and what the slimmer made of it."""
    model, inputs = build(name)
    damage(model, inputs)
    return model, inputs, slim_model(model, inputs, tracer=tracer)


def dead_blocks(name: str) -> str:
    """What becomes of the first feed-forward block, attention and inner convolution where all of it is dead."""
    model, inputs = build(name)
    graph = trace(model, inputs)
    blocks = [*find_feed_forward(graph, model)[:1], *find_attention(graph, model)[:1]]
    readers = [block.root if isinstance(block, FeedForward) else block.output for block in blocks]
    inner = [key for key, part in model.named_modules() if isinstance(part, nn.Conv2d) and part.in_channels > 3]
    readers += [key for key in inner if model.get_submodule(key).groups == 1][-1:]
    for reader in readers:
        nn.init.zeros_(model.get_submodule(str(reader)).weight)
    result = slim_model(model, inputs)
    words = {"feed-forward units": "feed-forward", "heads": "attention", "channels": "convolution"}
    said = {words[item.kind]: "removed" for item in result.cuts if item.after == 0}
    for refusal in result.refused:
        before, stays, reason = [*re.split("; (.+ stays?[^:]*): ", refusal.reason, maxsplit=1), "", ""][:3]
        if "all" in before and reason:
            convolved = isinstance(model.get_submodule(refusal.where), nn.Conv2d)
            kind = "attention" if "heads" in before else "convolution" if convolved else "feed-forward"
            said.setdefault(kind, f"{stays}: {reason.split(' (')[0]}")
    return "; ".join(f"{kind} {what}" for kind, what in said.items()) or "as above"


def found(result: SlimResult) -> str:
    """How many places of each kind."""
    counts: dict[str, int] = {}
    for item in result.found:
        counts[item["kind"]] = counts.get(item["kind"], 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def cut(result: SlimResult) -> str:
    """What went, summed over places of one kind."""
    sums: dict[str, list[int]] = {}
    for item in result.cuts:
        total = sums.setdefault(item.kind, [0, 0])
        total[0] += item.before - item.after
        total[1] += item.before
    return ", ".join(f"{gone} of {before} {kind}" for kind, (gone, before) in sums.items()) or "nothing"


def refused(result: SlimResult) -> str:
    """What stays and why: each reason once."""
    reasons: dict[str, str] = {}
    for refusal in result.refused:
        count, _, reason = refusal.reason.partition(": ")
        start = refusal.reason if not reason else f"{count.split(' are ')[0]}: {reason}"
        reasons.setdefault((reason or count).split(";")[0], f"`{refusal.where}` {start}")
    for item in result.found:
        if item["obstacle"] is not None:
            reasons.setdefault(item["obstacle"], f"the {item['kind']} of `{item['where']}`: {item['obstacle']}")
    return "; ".join(reasons.values()).replace("|", "\\|") or "nothing is dead but stays"


def row(name: str) -> list[str]:
    """One line of the table."""
    results = {tracer: slimmed(name, tracer)[2] for tracer in ("jit", "export")}
    jit, export = results["jit"], results["export"]
    same = all(getattr(jit, part) == getattr(export, part) for part in ("found", "cuts", "refused", "widths"))
    parameters = f"{jit.parameters_before:,} → {jit.parameters_after:,}"
    apart = max(jit.certificate.max_abs_difference, export.certificate.max_abs_difference)
    same_words = "the same" if same else "differ"
    return [name, found(jit), cut(jit), refused(jit), dead_blocks(name), parameters, same_words, f"{apart:.0e}"]


HEAD = """\
# What the slimmer does to each architecture

[Small random models](../tests/slimming/architectures.py) in float32, with some units, channels and heads zeroed.
Everything that is dead is cut exactly or refused by name. "Found" counts the places whose width could change: feed-
forward blocks, attentions, channels between convolutions, and streams, which more than one layer reads. Each reason
is given once, for the first layer that it holds. "Whole blocks" is what becomes of the first feed-forward block, the
first attention and the last inner convolution where all of their units, heads or channels are dead. "Tracers" says
whether torch.jit and torch.export lead to the same findings, cuts and refusals. The last column is the largest
absolute difference of any output on any of the certificate's inputs.

Written by `scripts/architectures`; a test fails while it is stale.

| architecture | found | cut | refused, and why | whole blocks | parameters | tracers | difference |
|---|---|---|---|---|---|---|---|
"""
MORE_HEAD = """
## More of them

Written by `scripts/architectures --all`, which takes some minutes; no test repeats it.

| architecture | found | cut | refused, and why | parameters | tracers | difference |
|---|---|---|---|---|---|---|
"""


def table(names: Iterable[str]) -> str:
    """One line for each name."""
    return "".join(f"| {' | '.join(row(name))} |\n" for name in names)


def page(first: str, second: str | None = None) -> str:
    """The page as text: its tables, the second as it was unless given."""
    if second is None:
        second = PAGE.read_text(encoding="utf-8").partition(MORE_HEAD)[2]
    return HEAD + first + (MORE_HEAD + second if second else "")


def add_more() -> tuple[str, ...]:
    """Let the second table's architectures be known; their names."""
    from more_architectures import MORE, MORE_PLAIN

    TRANSFORMERS.update(MORE)
    PLAIN.update(MORE_PLAIN)
    return (*MORE, *MORE_PLAIN)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    more = add_more() if chosen else ()
    if chosen and chosen != ["--all"]:
        print(table(chosen))
    else:
        PAGE.write_text(page(table(NAMES), table(more) if more else None), encoding="utf-8")
        print(f"wrote {PAGE}")
