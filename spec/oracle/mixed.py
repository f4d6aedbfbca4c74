"""mixed.py OUT: which layers stock mlx-lm's mixed recipes give their high width, a line per recipe,
number of layers and projection."""
import sys

from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder


class Model:
    """What the builder looks at."""

    def __init__(self, n):
        self.layers = [None] * n

    def named_modules(self):
        return [(f"language_model.model.layers.{i}.mlp.down_proj", None)
                for i in range(len(self.layers))]


with open(sys.argv[1], "w") as out:
    for recipe in QUANT_RECIPES:
        for n in (4, 7, 8, 24, 40, 64):
            predicate = mixed_quant_predicate_builder(recipe, Model(n))
            for name in ("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"):
                bits = [predicate(f"language_model.model.layers.{i}.{name}", None)["bits"]
                        for i in range(n)]
                print(recipe, n, name.split(".")[1], *bits, file=out)
