"""Cross-attention among tokens, for the fusions that let one sequence ask another."""

from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.models.tokens import Tokens


class CrossAttention(nn.Module):
    """A pre-norm transformer block whose queries and keys come from two sequences (Vaswani et al. 2017).

    Ours, because MONAI's CrossAttentionBlock takes no mask of keys, so that padding and absent modalities would count.
    Of plain linear layers: torch's MultiheadAttention holds bare parameters, whose gradients per study hooks miss.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_context, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, context: Tokens) -> Tensor:
        """[B, N, D] after each of its tokens attended to the valid tokens of `context`; to nothing where none is."""
        queries = self.query(self.norm_query(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys_values = self.key_value(self.norm_context(context.x)).unflatten(-1, (2, self.heads, -1))
        keys, values = keys_values.permute(2, 0, 3, 1, 4)
        nothing = ~context.mask.any(1, keepdim=True)
        # Attention to no key at all is 0/0 in some of torch's kernels: such a study attends to all of them, and what it
        # gathers is thrown away.
        mask = (context.mask | nothing)[:, None, None, :]
        gathered = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + self.out(gathered.transpose(1, 2).flatten(2)).masked_fill(nothing[..., None], 0.0)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out
