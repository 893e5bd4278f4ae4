"""How fast products are, and what follows from it."""

from transformer_vq import ModelConfig
from transformer_vq.run.peak import WORTH_ROUNDING, Rates, product_rates


def test_rates_of_products():
    """They are of this machine, whatever it is; a small lead does not decide."""
    rates = product_rates(ModelConfig.preset("tiny", d_model=16, d_k=8))
    assert rates.float32 > 0 and rates.rounded > 0
    assert Rates(1e11, WORTH_ROUNDING * 1e11).faster == "bfloat16"
    assert Rates(1e11, 0.99 * WORTH_ROUNDING * 1e11).faster == "float32"
    assert str(Rates(2e11, 5e11)) == (
        "those of a unit run at 200 GFLOP/s in float32 and at 500 rounded to bfloat16"
    )
