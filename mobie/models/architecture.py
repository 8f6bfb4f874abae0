"""What an architecture is: a table of names, and the groups of Linears that several architectures have in common."""

from __future__ import annotations

from dataclasses import dataclass

Groups = tuple[tuple[str, ...], ...]  # Linears that share their input stand in one group

ATTENTION: Groups = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
DENSE_MLP: Groups = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
SHARED_EXPERT: Groups = (  # Qwen: one, weighted by `shared_expert_gate`, a single row that is kept
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
)
SHARED_GATE = ("mlp.shared_expert", "mlp.shared_expert_gate")
SHARED_EXPERTS: Groups = (  # DeepSeek: several, stored as one of their joint width
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.shared_experts.down_proj",),
)


@dataclass(frozen=True)
class Architecture:
    """Names inside a decoder block of one `model_type`.

    linear_groups: Linears grouped by shared input; a name that a block lacks (dense first layers, layers with another
                   kind of attention) is passed over.
    shared_gate:   the shared expert and the Linear whose sigmoid multiplies its output, where there is such a Linear.
    """

    model_type: str
    blocks: str = "model.layers"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    linear_groups: Groups = ATTENTION
    shared_gate: tuple[str, str] | None = None
