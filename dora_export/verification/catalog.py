"""Every finding a verification can report: what it means and what to do about it.

``dora-export explain CODE`` prints an entry; a finding's gravity is that of its entry.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Tier = Literal["ledger", "oracle", "forward", "onnx"]
Severity = Literal["wrong", "unchecked", "warning", "note"]


class Meaning(NamedTuple):
    """What a finding means.

    Attributes:
        code: What ``explain`` and JSON call it.
        tier: The tier that finds it.
        severity: "wrong" fails the verification; "unchecked" keeps it from passing.
        title: A few words.
        means: What it says about the merged model, and how it usually comes about.
        do: What to do.
    """

    code: str
    tier: Tier
    severity: Severity
    title: str
    means: str
    do: str


# fmt: off
FINDINGS: tuple[Meaning, ...] = (
    # --- ledger: files, names, shapes, dtypes, bytes
    Meaning("file-unreadable", "ledger", "wrong", "a weight file cannot be read",
            "A file of the merged model is truncated, empty or not what its name says.",
            "Write the model again; if it was copied, compare sizes and copy it again."),
    Meaning("file-missing", "ledger", "wrong", "a weight file is missing",
            "The index names a file that is not there: the model cannot be loaded whole.",
            "Copy the missing file, or merge again."),
    Meaning("file-extra", "ledger", "warning", "a weight file that the index does not name",
            "Loaders ignore it, or worse, prefer it. Usually left by an earlier export.",
            "Remove it if it is not part of the model."),
    Meaning("adapter-left", "ledger", "warning", "adapter files lie in the merged folder",
            "Loaders that find adapter_config.json apply the adapter a second time.",
            "Remove adapter_config.json and adapter_model.* from the merged folder."),
    Meaning("index-wrong", "ledger", "wrong", "the index does not fit the files",
            "The index places a tensor in a file that does not hold it, or omits one that a file "
            "holds. Loaders fail, or leave the tensor at random values.",
            "Merge again, or rebuild the index from the files' headers."),
    Meaning("total-size", "ledger", "wrong", "the index gives a wrong total_size",
            "metadata.total_size is not the number of bytes of all tensors. Some loaders plan "
            "memory by it.",
            "Merge again, or correct the number in the index."),
    Meaning("tensor-missing", "ledger", "wrong", "a tensor is missing",
            "The base, or the adapter, has a tensor that the merged model has not. Loaders fill it "
            "with random values, often with no more than a warning.",
            "Merge again with a tool that keeps every tensor."),
    Meaning("tensor-extra", "ledger", "wrong", "a tensor that neither base nor adapter has",
            "Nothing says where it comes from: a wrapper's name, a left-over adapter tensor, or "
            "another model's.",
            "Find out what wrote it; merge again into an empty folder."),
    Meaning("tensor-twice", "ledger", "wrong", "a tensor is stored twice",
            "Two files hold a tensor of the same name; which one counts depends on the loader.",
            "Remove one of the files, or merge again."),
    Meaning("head-stored", "ledger", "note", "the tied head is stored as well",
            "The model ties its head to the embedding, and the file holds both, equal. Harmless.",
            "Nothing."),
    Meaning("head-left-out", "ledger", "note", "the tied head is not stored a second time",
            "The base stores a tensor twice that the model ties, equal; the merged model stores it "
            "once, and loaders make the other from it.",
            "Nothing."),
    Meaning("computed-buffer", "ledger", "warning", "a buffer that the model computes is different",
            "Rotary frequencies, position ids or causal masks are left out, stored as well, or in "
            "another type. Current classes compute them and ignore the file; an old class, or "
            "another engine, may read them.",
            "Nothing for current transformers; otherwise merge again with a tool that keeps every "
            "tensor."),
    Meaning("names-prefixed", "ledger", "warning", "all tensor names have another prefix",
            "The model was saved through a class that puts its own name before the base's tensor "
            "names, or takes it off. transformers reads both; other engines may not.",
            "Merge again with a tool that keeps the base's names if the engine needs them."),
    Meaning("names-renamed", "ledger", "note", "tensor names are those of another version",
            "The model was saved under the names that another version of transformers, or another "
            "class for the same weights, gives them. Its loaders know both. Every tensor was "
            "paired with the base's and compared.",
            "Nothing for transformers; merge again with a tool that keeps the base's names if "
            "another engine needs them."),
    Meaning("shape-differs", "ledger", "wrong", "a tensor has another shape",
            "The merged tensor has not the shape that base and adapter give it.",
            "Check that this is the base that was merged; merge again."),
    Meaning("transposed", "ledger", "wrong", "a tensor is stored transposed",
            "Its dimensions are the expected ones in reverse order: the merge mixed up the layouts "
            "(out, in) and (in, out).",
            "Merge again with a tool that knows the layer's layout (GPT-2's Conv1D stores "
            "(in, out))."),
    Meaning("dtype-differs", "ledger", "wrong", "a tensor was cast",
            "It is stored in another type than the base's, and not because all of them are.",
            "Merge again, keeping each tensor's own type; or pass --dtype if it was intended."),
    Meaning("model-cast", "ledger", "note", "the whole model was cast",
            "Every floating-point tensor is stored in the same type, which is not the base's. "
            "Values are compared after that cast.",
            "Nothing if it was intended; a cast to fp32 doubles the size and adds no precision."),
    Meaning("bytes-differ", "ledger", "wrong", "a tensor that should go along as it is differs",
            "The adapter changes none of its values, or brings them whole, and yet they are not "
            "the source's: the file is damaged, or something else changed it.",
            "Merge again; if it happens again, check the disk and the base's own digests."),
    Meaning("not-comparable", "ledger", "unchecked", "untouched tensors are stored packed",
            "Tensors that the adapter does not touch are quantised; their bytes cannot be held "
            "against the base's.",
            "Verify the model before it was quantised."),
    Meaning("another-base", "ledger", "wrong", "the model was made from another base",
            "Most tensors that the adapter does not touch differ from this base's.",
            "Verify against the base that was merged, or merge the adapter into the base it was "
            "trained on."),
    Meaning("config-missing", "ledger", "wrong", "config.json is missing or unreadable",
            "The model cannot be loaded.", "Copy the base's config.json, or merge again."),
    Meaning("config-vocab", "ledger", "wrong", "vocab_size does not fit the embedding",
            "config.json gives another number of tokens than the embedding or the head has rows.",
            "Set vocab_size to the rows of the embedding, or merge again."),
    Meaning("config-tied", "ledger", "wrong", "tie_word_embeddings does not fit the tensors",
            "Either the head differs from the embedding and the config ties them, so that loaders "
            "overwrite the head; or the config unties them and no head is stored, so that loaders "
            "make up a random one.",
            "Set tie_word_embeddings to what the tensors say, or merge again."),
    Meaning("config-dtype", "ledger", "wrong", "config.json gives another dtype than the tensors",
            "Loaders that follow the config cast the weights when they load them.",
            "Set dtype (torch_dtype) to the type of the tensors."),
    Meaning("config-changed", "ledger", "wrong", "config.json says something else than the base's",
            "A value that decides what the model computes is not the base's, and the merge does "
            "not ask for it.",
            "Restore the base's value."),
    Meaning("config-rewritten", "ledger", "warning", "config.json was written anew",
            "Values differ that decide nothing here, or that a library writes in its own way when "
            "it saves a config. Other versions may read them differently.",
            "Prefer the base's config.json."),
    Meaning("tokenizer-missing", "ledger", "wrong", "tokenizer files are missing",
            "Base or adapter have tokenizer files that the merged model has not.",
            "Copy them, or merge again."),
    Meaning("tokenizer-differs", "ledger", "wrong", "the tokenizer is not the one to expect",
            "Its content is neither the adapter's nor the base's: text becomes other tokens.",
            "Copy the adapter's tokenizer if it has one, else the base's."),
    Meaning("tokenizer-rewritten", "ledger", "warning", "a tokenizer file was written anew",
            "It differs from the source's in form or in settings beside the vocabulary.",
            "Prefer the original files."),
    Meaning("side-file-missing", "ledger", "warning", "a side file is missing",
            "The base has a file beside its weights that the merged model has not, such as "
            "generation_config.json or a processor's settings.",
            "Copy it if the model is used in a way that needs it."),
    Meaning("side-file-differs", "ledger", "warning", "a side file differs from its source",
            "A file that goes along unchanged was changed.",
            "Copy the source's, if the change was not intended."),
    Meaning("weights-only", "ledger", "note", "only the weights were looked at",
            "The merged model was named as a single file, so config and tokenizer were not "
            "compared.",
            "Name its folder to check the files beside it too."),
    Meaning("manifest-differs", "ledger", "wrong", "the manifest tells of another merge",
            "dora_export.json says that other files went into this model than those given now.",
            "Verify against the base and adapter that the manifest names, or merge again."),
    Meaning("nothing-applied", "ledger", "wrong", "the merged model is the base",
            "Every tensor has the base's bytes: the adapter is not in there at all.",
            "Merge again; check that the tool reported matching names."),
    # --- oracle: changed tensors against the float64 formula
    Meaning("not-applied", "oracle", "wrong", "the adapter was not applied",
            "The tensor has the base's values although the adapter changes it.",
            "Merge again; check the names of the adapter's tensors against the base's."),
    Meaning("applied-twice", "oracle", "wrong", "the adapter was applied twice",
            "The tensor is what a second merge onto the merged model gives.",
            "Merge into the original base, once."),
    Meaning("sign-flipped", "oracle", "wrong", "the update was subtracted",
            "The tensor is that of W - s B A: an unmerge of something that was not merged.",
            "Merge again from the original base."),
    Meaning("scaling-other", "oracle", "wrong", "another scaling was used",
            "The tensor fits the adapter with another factor on B A: alpha left out, alpha/sqrt(r) "
            "for alpha/r or the reverse, a pattern of ranks or alphas ignored.",
            "Merge again with the scaling of the adapter's config (use_rslora, rank_pattern, "
            "alpha_pattern)."),
    Meaning("strength-other", "oracle", "wrong", "another strength was used",
            "The tensor is W + strength (W' - W) with a strength that was not asked for.",
            "Pass --strength if it was intended, or merge again."),
    Meaning("adapter-left-out", "oracle", "wrong", "one of several adapters is not in it",
            "The tensor is what the other adapters give without this one.",
            "Merge again with all adapters, or verify with those that were merged."),
    Meaning("adapters-reordered", "oracle", "wrong", "the adapters were merged in another order",
            "A DoRA factor scales what came before it, so the order of several adapters counts.",
            "Give the adapters in the order they were merged in, or merge again."),
    Meaning("norms-of-merged", "oracle", "wrong", "norms of what was merged before",
            "Adapters were merged one by one, each divided by the norm of the merged weight and "
            "not of the base's, as PEFT before 0.21 did. Its active adapters compute otherwise.",
            "Merge again, with all adapters at once."),
    Meaning("norm-other-axis", "oracle", "wrong", "the norm was taken over the other axis",
            "The magnitudes were applied per input where the trainer had one per output, or the "
            "reverse. On square layers this runs without an error.",
            "Merge again with the adapter's own axis."),
    Meaning("norm-of-base", "oracle", "wrong", "divided by the norm of W, not of W + s B A",
            "The direction was not normalised after the update was added.",
            "Merge again with the norm of W + s B A."),
    Meaning("magnitude-ignored", "oracle", "wrong", "the magnitudes were left out",
            "The rows have length one: divided by their norm and not multiplied by m.",
            "Merge again with the magnitudes."),
    Meaning("magnitude-initial", "oracle", "wrong", "the magnitudes are those before training",
            "The rows have the lengths of the base's: the trained magnitudes were not loaded and "
            "were made anew from W.",
            "Merge again; check that the loader found the magnitude tensors."),
    Meaning("lora-for-dora", "oracle", "wrong", "merged as plain LoRA",
            "The tensor is W + s B A: the magnitudes of this DoRA adapter were dropped.",
            "Merge again with a tool that knows DoRA."),
    Meaning("factors-ignored", "oracle", "wrong", "A and B were left out",
            "Only the magnitudes were applied: m W / ||W||.",
            "Merge again; check that the loader found A and B."),
    Meaning("magnitude-of-another", "oracle", "wrong", "the magnitudes of another tensor were used",
            "The direction is right, the row lengths are those of another layer.",
            "Merge again; the magnitudes were mixed up."),
    Meaning("magnitude-other", "oracle", "wrong", "other magnitudes were used",
            "The directions are right, the lengths of the rows are neither the adapter's "
            "magnitudes nor those of another layer: an older checkpoint's, magnitudes that count "
            "from one, or ones that were rounded or rescaled.",
            "Merge again; check which magnitudes the tool read, and in which type."),
    Meaning("update-of-another", "oracle", "wrong", "the update of another tensor was applied",
            "The tensor is this base tensor with the A and B of another layer or expert: one "
            "order of experts for another, or layers mixed up.",
            "Merge again with the trainer's own order."),
    Meaning("update-permuted", "oracle", "wrong", "rows or ranks of the update are mixed up",
            "The tensor is this base tensor with the rows of B in another order than its own, or "
            "with the columns of B beside other rows of A: a fused or permuted layer whose update "
            "was not put into the base's order, or an A and a B that do not belong together.",
            "Merge again; check how the tool splits, joins or permutes the layer."),
    Meaning("tensor-of-another", "oracle", "wrong", "holds the values of another tensor",
            "The tensor is another layer's or expert's merged one: they were swapped.",
            "Merge again; two tensors or experts changed places."),
    Meaning("rows-permuted", "oracle", "wrong", "rows are in another order",
            "The rows are right and stand elsewhere: an order of heads, of rotary halves or of "
            "fused parts that is not the base's.",
            "Merge again with the base's order of rows."),
    Meaning("transposed-values", "oracle", "wrong", "a square tensor is stored transposed",
            "The values are the expected ones with rows and columns exchanged.",
            "Merge again with the layer's own layout."),
    Meaning("rows-wrong", "oracle", "wrong", "some rows are wrong",
            "Most rows are right, some are not: rows of B or magnitudes that were not loaded, a "
            "part of a fused layer that was left out, or bytes that were damaged later.",
            "Merge again; if the same rows fail, the adapter was loaded incompletely, if others "
            "do, check disk and memory."),
    Meaning("not-finite", "oracle", "wrong", "NaN or infinity",
            "The tensor holds values that are not finite where the exact ones are.",
            "Look for rows of zeros in the base, whose norm is zero, and for values beyond 65504 "
            "that were stored as fp16; merge again in a type with the range."),
    Meaning("wrong-values", "oracle", "wrong", "the values are not those of this merge",
            "The tensor differs from the exact result by more than rounding, and fits no known "
            "mistake.",
            "Check that base and adapter are the ones that were merged, in the same revision, and "
            "that nothing else was done to the model (another adapter, training, quantisation and "
            "back); then merge again."),
    Meaning("coarse-rounding", "oracle", "warning", "computed in less precision than it is stored",
            "The values are right to the precision of a coarser type than the one they are stored "
            "in, so part of the stored digits carries nothing.",
            "Merge again in float32 or better for the precision that the type has."),
    Meaning("rounded", "oracle", "note", "right, with more rounding than necessary",
            "The values are those of this merge, rounded more than once in the stored type's "
            "precision. Other tools' merges look like this.",
            "Nothing if the precision suffices; merge again in float32 for the nearest values."),
    Meaning("quantised", "oracle", "unchecked", "stored in a type that cannot be checked",
            "The merged tensor is quantised or packed; the exact result cannot be held against it.",
            "Verify the model before it was quantised."),
    # --- forward: the merged model against the unmerged one
    Meaning("layer-differs", "forward", "wrong", "a layer computes something else",
            "On the same input, the merged layer's output differs from base + adapter by more than "
            "the storage type's own noise.",
            "See what the oracle says of its weight; merge again."),
    Meaning("outputs-differ", "forward", "wrong", "the model computes something else",
            "The merged model's outputs differ from those of base + adapter by more than the "
            "storage type's own noise.",
            "See the layers with the largest differences; merge again."),
    Meaning("text-differs", "forward", "wrong", "the model writes something else",
            "Greedy text parts where the unmerged model has a clear preference.",
            "See the layers with the largest differences; merge again."),
    Meaning("load-fails", "forward", "wrong", "the merged model cannot be loaded",
            "transformers loads the base but not the merged folder, or not all of its tensors.",
            "Put right what the message names (mostly config.json, or a tensor that the ledger "
            "lists too), or merge again."),
    Meaning("peft-differs", "forward", "warning", "PEFT's active adapter computes something else",
            "PEFT gives other outputs than base + adapter in activation form. Known causes: "
            "adapters on tied embeddings, wrappers within wrappers.",
            "Compare with the trainer's own forward; report the case if it is none of these."),
    Meaning("forward-extra", "forward", "unchecked", "the forward pass could not be run",
            "transformers (or diffusers) is not installed.",
            "pip install 'dora-export[transformers]', then verify again."),
    Meaning("forward-unsupported", "forward", "unchecked", "the forward pass could not be checked",
            "The model's class, or a layer of it, is not one that the forward tier can run "
            "unmerged.",
            "Rely on ledger and oracle, or compare outputs with the trainer."),
    Meaning("layer-idle", "forward", "unchecked", "a changed layer was not reached",
            "No input that the forward tier can make leads through this layer, for example experts "
            "that no token is sent to, or a part of the model that other inputs would use.",
            "Give prompts that use it (--prompt), or rely on ledger and oracle."),
    Meaning("effect-unseen", "forward", "note", "the adapter's effect is below the noise",
            "Layers or outputs with and without the adapter differ by less than computing in the "
            "storage type does, so running the model cannot tell whether it was merged there. "
            "Usual for an adapter that has hardly been trained.",
            "Nothing: the oracle tier decides about them."),
    # --- onnx: a graph against the unmerged model
    Meaning("graph-inputs", "onnx", "wrong", "the graph has other inputs or outputs",
            "Names of inputs or outputs are not the model's.",
            "Export the graph again with the names of the model's forward."),
    Meaning("graph-differs", "onnx", "wrong", "the graph computes something else",
            "Outputs of the graph differ from the unmerged model's beyond the tolerance.",
            "Export the graph again from a verified merge."),
    Meaning("graph-mistaken", "onnx", "wrong", "the graph computes a known mistake",
            "Its outputs are nearer to the base's, or to those of an adapter without its "
            "magnitudes or with another scaling, than to those of base and adapter.",
            "Export the graph again from a verified merge."),
    Meaning("graph-stale", "onnx", "wrong", "the graph holds weights of the base",
            "An initializer has the base's values where the adapter changes them.",
            "Export the graph again from a verified merge."),
    Meaning("graph-outside", "onnx", "wrong", "the graph names files outside its folder",
            "Its external data would be read from elsewhere on the machine. It is not opened.",
            "Do not use it; export the graph again with its data beside it."),
    Meaning("graph-blind", "onnx", "unchecked", "what is allowed hides the adapter",
            "The base without the adapter would pass as well: the tolerance is larger than all "
            "that the adapter changes.",
            "State a smaller budget, or verify the graph before it was quantised."),
    Meaning("graph-coarse", "onnx", "note", "the noise of 16 bits is allowed",
            "The graph's weights are float32, but whether they were merged so, or rounded to the "
            "base's type first, could not be told: no initializer is as the checkpoint has it, and "
            "no manifest says.",
            "Pass --dtype fp32 if it was merged in float32: then less is allowed."),
    Meaning("graph-fixed", "onnx", "wrong", "the graph takes fewer shapes than it says",
            "It says that it takes any number of sequences, and fails with other numbers than the "
            "one it was traced with.",
            "Export it again with an open batch axis, or say in the graph that it is fixed."),
    Meaning("graph-unsupported", "onnx", "unchecked", "the graph could not be run",
            "onnxruntime does not run it, or the reference model cannot be run.",
            "Follow the message if it names a package or an operator that is missing; otherwise "
            "verify the merged folder that the graph was made from."),
)
# fmt: on
MEANINGS = {m.code: m for m in FINDINGS}
