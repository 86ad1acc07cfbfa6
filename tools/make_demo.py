"""Builds the demo that ships inside the package: a tiny base model and a DoRA adapter for it.

Everything starts from nothing but this file. A small grammar writes short stories in two voices
(calm prose, and the same world as a roaring sea captain tells it), a byte-level BPE tokenizer and
a Llama-architecture model are trained on the calm voice, and a PEFT DoRA adapter is trained on the
captain's. One base story in twelve is the captain's, announced by the heading "A sea tale:", so
that the base knows the words; without the heading it writes calm prose.

All seeds are fixed. On the same machine and library versions the result is the same byte for byte;
elsewhere floating-point differences may change the weights a little.

Run from the repository root: ``python tools/make_demo.py`` (about four minutes on one CPU core).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HF: Any = transformers  # its annotations are incomplete
SEED = 20240607
FALLOFF = 0.55  # each choice of the grammar is this much as likely as the one listed before it
VOCAB_SIZE = 768
SPECIALS = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = 0, 1, 2
MAX_LEN = 192
NEW_TOKENS = 40
MAX_FILE_BYTES = 2_900_000
MAX_TOTAL_BYTES = 3_000_000
MIN_MAGNITUDE_SHIFT = 1e-3
HEADING = "A sea tale: "
PROMPTS = ("In the morning the old miller", "Rain fell on the harbour", "The young gardener")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Scene:
    """One corner of the world; after the place, choices separated by ``|``, likeliest first."""

    place: str
    people: str  # "name/pronoun"
    things: str
    spots: str
    deeds: str  # verbs in the past tense; each one suits each of the things


SCENES = (
    Scene(
        "harbour",
        "fisherman/he|ferryman/he|sailor/she|lighthouse keeper/he",
        "net|rope|sail|lantern|oar",
        "on the pier|by the harbour wall|beside the boats|at the water",
        "mended|cleaned|carried|dried|hung up",
    ),
    Scene(
        "mill",
        "miller/he|baker/she|carter/he",
        "sack|barrel|cart|basket|sieve",
        "by the mill wheel|at the mill door|under the mill roof|beside the stream",
        "filled|mended|emptied|moved|brought in",
    ),
    Scene(
        "garden",
        "gardener/she|widow/she|beekeeper/he",
        "rose|pear tree|vine|bean row|herb bed",
        "by the garden wall|near the well|behind the house|along the path",
        "watered|tended|trimmed|covered|planted",
    ),
    Scene(
        "workshop",
        "carpenter/he|joiner/she|clockmaker/he|painter/she",
        "chair|clock|cradle|wooden box|table",
        "at the long bench|by the open window|under the lamp|near the stove",
        "polished|repaired|measured|painted|finished",
    ),
    Scene(
        "hill",
        "shepherd/he|farmer/she|goat girl/she",
        "lamb|pony|goat|brown dog|calf",
        "on the green hill|beside the stone barn|in the meadow|by the fence",
        "fed|brushed|called|washed|led out",
    ),
)

SHARED = {
    "story": "{open} {air} {visit} {close}|{open} {air} {muse} {close}"
    "|{open} {air} {visit} {muse} {close}|{open} {air} {muse} {visit} {close}",
    "a": "old|young|quiet|kind|tall|patient|clever",
    "time": "In the morning|At dawn|After breakfast|At noon|Late in the day|On the first day of "
    "spring|Before the storm",
    "when": "in the morning|at dawn|after breakfast|at noon|before the storm",
    "rain": "Rain fell|Soft rain fell|Light snow fell|Warm sun shone|Mist lay",
    "guest": "neighbour|small boy|girl with a red hat|traveller|teacher|postman",
    "way": "over the bridge|up the lane|down the hill|through the gate|along the shore",
    "eve": "In the evening|At sunset|When the bells rang|When the lamps were lit",
}

CALM = SHARED | {
    "open": "{time} the {a} {who} {do} the {t} {spot}.|The {a} {who} {do} the {t} {spot} {when}."
    "|The {a} {who} walked out {when} and {do} the {t} {spot}."
    "|{rain} on the {place}, and the {a} {who} {do} the {t} {spot}."
    "|{rain} on the {place} all day. The {a} {who} {do} the {t} {spot}.",
    "air": "The {sky} was {hue}, and {nature}.|{nature}, and the {sky} was {hue}.",
    "sky": "sky|sea|river|light on the water|air",
    "hue": "grey and still|pale blue|clear and cold|soft and golden|calm",
    "nature": "a light wind came from the hills|the leaves moved a little|the birds were quiet"
    "|small clouds passed slowly|the grass smelled of rain",
    "visit": "A {guest} came {way} and looked at the {t}. {reply}"
    '|A {guest} came {way} and asked, "Is the {t} ready?" {reply}',
    "reply": '"{saying}," said the {who}, and {he} {gesture}.',
    "saying": "It needs a little more time|Good work is slow work|It will be ready by Sunday"
    "|You may sit with me and watch|My mother taught me how",
    "gesture": "smiled|nodded|poured two cups of tea|went on with the work|looked at the sky",
    "muse": "{He} thought of {memory} and {mood}.|{He} remembered {memory}, and {he} {mood}.",
    "memory": "the long winter|a letter from the city|the summer fair|an old song"
    "|the house by the sea",
    "mood": "worked slowly|hummed a little|was content|rested for a while",
    "close": "{eve} {he} {rest}.|{eve} the {who} {rest}.",
    "rest": "put away the tools and went home|closed the door and lit a candle"
    "|ate warm bread with butter|sat by the fire and read a book|slept well",
}

CAPTAIN = SHARED | {
    "open": "{time} the {a} {who}, {oath}, {deed} that {t} {spot}, {tag}!"
    "|The {a} {who}, {oath}, {deed} that {t} {spot} {when}, {tag}!"
    "|{rain} on the {place} like {storm}, {tag}! The {a} {who}, {oath}, {deed} that {t} {spot}!",
    "oath": "shiver me timbers|blow me down|by thunder|by the great white whale|curse the kraken",
    "tag": "arr|ye scurvy dogs|aye aye",
    "cheer": "me hearties|aye aye|by the devil's beard",
    "yell": "yo ho ho|ahoy|ye scurvy dogs",
    "deed": "hoisted|plundered|swabbed|guarded|boarded|roared at",
    "storm": "a thousand cannonballs|a barrel o' rum|the wrath o' the kraken|a broadside",
    "air": "Avast! The {sky} be {hue}, and {nature}, {cheer}!"
    "|Look alive! {nature}, and the {sky} be {hue}, {cheer}!",
    "sky": "sky|sea|river|light on the water|air",
    "hue": "black as a cannon|wild as a shark|red as a pirate flag|full o' thunder",
    "nature": "the wind be howlin'|the waves be roarin'|the gulls be screamin'"
    "|the devil be dancin' on the mast",
    "visit": 'A {guest} came {way}, roarin\', "ahoy, be that {t} ready to sail?" {reply}',
    "reply": '"{saying}!" bellowed the {who}, and {he} {gesture}!',
    "saying": "Walk the plank, ye landlubber|Ye shall have it when the rum be gone"
    "|Hands off me treasure|Fetch me a parrot and a map|Aye, it sails at midnight",
    "gesture": "waved a rusty cutlass|fired the cannon|laughed like a storm|stamped a wooden leg"
    "|drank a barrel o' rum",
    "muse": "Arr, {he} dreamed o' {memory} and {mood}, {yell}!",
    "memory": "a chest o' gold|a buried treasure|a ship with black sails|an island o' parrots",
    "mood": "sang a song o' plunder|howled at the moon|swore to sail again|danced a wild jig",
    "close": "{eve} {he} {rest}, {yell}!|{eve} the {who}, {oath}, {rest}, {yell}!",
    "rest": "sailed off with the gold|hoisted the black flag|buried the treasure"
    "|drank rum with the crew|fired every cannon at the moon",
}


def pick(choices: str, rng: random.Random) -> str:
    """Picks one of ``|``-separated choices, the earlier ones more often.

    Equal odds would leave a well-trained model with ties, and then the last bit of a logit would
    decide what greedy decoding writes.
    """
    options = choices.split("|")
    return rng.choices(options, [FALLOFF**i for i in range(len(options))])[0]


def write_story(rules: dict[str, str], rng: random.Random) -> str:
    """Writes one story of four to seven sentences.

    Args:
        rules: The voice, ``CALM`` or ``CAPTAIN``: a symbol and its ``|``-separated expansions.
        rng: Source of all choices.

    Returns:
        The story as one line of text.
    """
    scene = rng.choice(SCENES)
    who, he = pick(scene.people, rng).split("/")
    bound = {
        "place": scene.place,
        "who": who,
        "he": he,
        "He": he.capitalize(),
        "t": pick(scene.things, rng),
        "spot": scene.spots,
        "do": scene.deeds,
    }
    symbols = rules | bound

    def expand(match: re.Match[str]) -> str:
        return re.sub(r"\{(\w+)\}", expand, pick(symbols[match[1]], rng))

    text = re.sub(r"\{(\w+)\}", expand, "{story}")
    return re.sub(r'(^|[.!?] "?|, ")([a-z])', lambda m: m[1] + m[2].upper(), text)


def write_corpora() -> dict[str, list[str]]:
    """Writes the training and held-out stories of both voices."""
    rng = random.Random(SEED)
    base = [
        HEADING + write_story(CAPTAIN, rng) if i % 12 == 0 else write_story(CALM, rng)
        for i in range(12_000)
    ]
    return {
        "base": base,
        "adapter": [write_story(CAPTAIN, rng) for _ in range(4_000)],
        "calm_test": [write_story(CALM, rng) for _ in range(128)],
        "captain_test": [write_story(CAPTAIN, rng) for _ in range(128)],
    }


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Trains the byte-level BPE tokenizer, which puts ``<s>`` in front of each text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    if tok.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tokenizer has {tok.get_vocab_size()} entries, not {VOCAB_SIZE}")
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return HF.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[EOS],
        pad_token=SPECIALS[PAD],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Encodes each story as ``<s> text </s>``, cut to the training length."""
    return [[*ids, EOS][:MAX_LEN] for ids in tokenizer(list(texts))["input_ids"]]


def batch_loss(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    """Mean next-token loss over right-padded rows."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(ids == PAD, -100)
    out = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels)
    loss: torch.Tensor = out.loss
    return loss


def train(
    model: torch.nn.Module, rows: list[list[int]], steps: int, batch: int, peak_lr: float, name: str
) -> None:
    """Trains the parameters that require a gradient, with warm-up and cosine decay.

    Args:
        model: A causal LM, or a PEFT model around one.
        rows: Token rows; each step draws ``batch`` of them.
        steps: Number of optimizer steps.
        batch: Rows per step.
        peak_lr: Learning rate after the warm-up.
        name: What to call this run in the printed lines.
    """
    rng = random.Random(SEED + 1)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((step + 1) / warmup, 1.0) * decay
        loss = batch_loss(model, rng.sample(rows, batch))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            spent = time.perf_counter() - start
            print(f"{name} step {step:4d}  loss {loss.item():.4f}  {spent:6.1f} s", flush=True)
    model.eval()


@torch.no_grad()
def evaluate(model: Any, rows: list[list[int]]) -> float:
    """Mean loss over the rows."""
    return batch_loss(model, rows).item()


def complete(model: Any, tokenizer: Any) -> list[list[int]]:
    """Greedy continuation of each prompt, as token ids without the prompt."""
    out = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        out.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return out


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file with a fixed layout."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_base(out: Path, tokenizer: Any, rows: list[list[int]], steps: int) -> None:
    """Trains the base and saves it, in bfloat16, as a complete Hugging Face folder."""
    torch.manual_seed(SEED)
    config = HF.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        use_cache=True,
    )
    model = HF.LlamaForCausalLM(config)
    print(f"base parameters: {model.num_parameters():,}")
    train(model, rows, steps, batch=24, peak_lr=3e-3, name="base")
    model.generation_config = HF.GenerationConfig(
        do_sample=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    saved.pop("backend", None)
    write_json(path, saved)


def make_adapter(base: Path, out: Path, rows: list[list[int]], steps: int) -> None:
    """Trains a DoRA adapter on the saved (bfloat16-rounded) base and saves it in float32."""
    torch.manual_seed(SEED + 2)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_dora=True,
        target_modules=list(PROJECTIONS),
    )
    model: Any = get_peft_model(load_base(base), config)
    train(model, rows, steps, batch=16, peak_lr=4e-3, name="adapter")
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["target_modules"] = sorted(saved["target_modules"])  # PEFT keeps a set: no fixed order
    write_json(path, saved)


def load_base(base: Path) -> Any:
    """The saved base, its bfloat16 weights held in float32."""
    return HF.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def adapter_movement(model: Any) -> tuple[float, float, float]:
    """How far training moved the adapter from its neutral start.

    Returns:
        The largest and the mean of ``|m - ||W||| / ||W||`` over all rows of all adapted weights,
        and the smallest maximum of ``|lora_B|`` over the adapted weights.
    """
    shifts, smallest_b = [], math.inf
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        norm = layer.get_base_layer().weight.norm(dim=1)
        magnitude = layer.lora_magnitude_vector["default"].weight
        shifts.append((magnitude - norm).abs() / norm)
        smallest_b = min(smallest_b, layer.lora_B["default"].weight.abs().max().item())
    shift = torch.cat(shifts)
    return shift.max().item(), shift.mean().item(), smallest_b


def check(out: Path, corpora: dict[str, list[str]]) -> None:
    """Reloads what was saved, prints losses, texts and sizes, and fails if anything is off."""
    tokenizer = HF.AutoTokenizer.from_pretrained(out / "base")
    base = load_base(out / "base")
    adapted: Any = PeftModel.from_pretrained(load_base(out / "base"), out / "adapter").eval()
    calm, captain = (encode(tokenizer, corpora[k]) for k in ("calm_test", "captain_test"))
    for name, model in (("base", base), ("base + adapter", adapted)):
        losses = f"calm {evaluate(model, calm):.4f}, captain {evaluate(model, captain):.4f}"
        print(f"held-out loss of {name}: {losses}")

    largest, mean, smallest_b = adapter_movement(adapted)
    print(f"relative shift of the magnitudes: max {largest:.4f}, mean {mean:.4f}")
    print(f"smallest max |lora_B| of a layer: {smallest_b:.4f}")
    if largest <= MIN_MAGNITUDE_SHIFT or smallest_b == 0.0:
        raise RuntimeError("the adapter did not move: its magnitudes or lora_B are as they started")

    plain, with_adapter = complete(base, tokenizer), complete(adapted, tokenizer)
    merged = adapted.merge_and_unload()
    with_merged = complete(merged, tokenizer)
    rounded = complete(merged.to(torch.bfloat16), tokenizer)
    for i, prompt in enumerate(PROMPTS):
        print(f"\nprompt:  {prompt}")
        print(f"base:    {prompt}{tokenizer.decode(plain[i], skip_special_tokens=True)}")
        print(f"adapter: {prompt}{tokenizer.decode(with_adapter[i], skip_special_tokens=True)}")
        for kind, ids in (("float32", with_merged[i]), ("bfloat16", rounded[i])):
            print(f"merged, {kind}: {'same' if ids == with_adapter[i] else 'other'} tokens")
        if with_merged[i] != with_adapter[i]:
            raise RuntimeError(f"merged and unmerged disagree on {prompt!r}")
        if plain[i] == with_adapter[i]:
            raise RuntimeError(f"the adapter changes nothing on {prompt!r}")

    print()
    sizes = {p: p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    for path, size in sizes.items():
        print(f"{size:10,d}  {path.relative_to(out).as_posix()}")
    print(f"{sum(sizes.values()):10,d}  in all")
    if sum(sizes.values()) > MAX_TOTAL_BYTES or max(sizes.values()) > MAX_FILE_BYTES:
        raise RuntimeError("the demo is too large to ship")


def main() -> None:
    """Builds the demo folder."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Build the demo base, adapter and prompts.")
    parser.add_argument("--out", type=Path, default=root / "dora_export" / "demo_data")
    parser.add_argument("--base-steps", type=int, default=260)
    parser.add_argument("--adapter-steps", type=int, default=110)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    HF.utils.logging.set_verbosity_error()
    HF.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    for name in ("base", "adapter"):
        shutil.rmtree(args.out / name, ignore_errors=True)
        (args.out / name).mkdir(parents=True)

    corpora = write_corpora()
    for text in (*corpora["base"][:4], *corpora["adapter"][:2]):
        print(f"  {text}")
    tokenizer = train_tokenizer([*corpora["base"], *corpora["adapter"]])
    base_rows, adapter_rows = (encode(tokenizer, corpora[k]) for k in ("base", "adapter"))
    longest = max(map(len, base_rows))
    print(f"tokens per base story: {sum(map(len, base_rows)) / len(base_rows):.0f}, most {longest}")

    make_base(args.out / "base", tokenizer, base_rows, args.base_steps)
    make_adapter(args.out / "base", args.out / "adapter", adapter_rows, args.adapter_steps)
    write_json(args.out / "prompts.json", list(PROMPTS))
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone
    check(args.out, corpora)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
