"""Parity with the recorded numbers of the reference implementation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import recorded
from transformer_vq import extend, init_state
from transformer_vq.io.official import from_official
from transformer_vq.nn import vq
from transformer_vq.ops.loss import loss_fn

CASES = [
    "f32_h1_pe0_tie0_agg1",
    "f32_h1_pe1_tie0_agg0",
    "f32_h1_pe1_tie1_agg1",
    "f32_h2_pe1_tie1_agg1",
    "f32_variant_mem4_block12",
    "f64_h1_pe1_tie1_agg1",
]
SLOW = (CASES[0], CASES[2], CASES[3])  # what others among these have too


class Case:
    """One recorded file: arrays by name, parameters by path."""

    def __init__(self, name):
        self.arrays = recorded(name)
        self.config = json.loads(self.arrays["config_json"].tobytes())
        self.double = self.config["dtype"] == "float64"

    def tree(self, prefix):
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def __getitem__(self, name):
        return self.arrays[name]


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def case(request):
    case = Case(request.param)
    with jax.enable_x64(case.double):
        yield case


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def log_probabilities(case, params):
    model = from_official(params, case.config)
    logits, _ = extend(model, init_state(model.config, 2), case["inputs"])
    return jax.nn.log_softmax(logits)


def test_log_probabilities(case):
    params = case.tree("params/")
    tolerance = 1e-9 if case.double else 1e-5
    close(log_probabilities(case, params), case["logprobs"], tolerance)
    # Control: the comparison notices one changed weight.
    name = "transformer_layers_0/scanned_attn1/r_proj/kernel"
    changed = {**params, name: params[name] * 1.01}
    with pytest.raises(AssertionError):
        close(log_probabilities(case, changed), case["logprobs"], tolerance)


def test_loss_and_gradients(case):
    """Through `from_official`, so that gradients carry its own names; and the new codebook.

    Its codebook gradient is the old value minus the moving average: ours is that average.
    """

    def loss(params):
        model = from_official(params, case.config)
        state = init_state(model.config, 2)
        batch = [jnp.asarray(case[k]) for k in ("inputs", "targets", "loss_mask")]
        return loss_fn(model.params, model, state, *batch)

    params = {k: jnp.asarray(v) for k, v in case.tree("params/").items()}
    (value, terms), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tolerance = 1e-9 if case.double else 1e-5
    close(terms.nll, case["l_lm"], tolerance)
    close(terms.commitment, case["l_commit"], tolerance * 10)  # a sum over units of about 10
    close(value, case["loss"], tolerance)
    for path, expected in case.tree("grads/").items():
        if "quantizer" in path:
            continue
        scale = np.abs(expected).max() + 1e-12
        limit = 1e-9 if case.double else 1e-4
        np.testing.assert_array_less(
            np.abs(np.asarray(grads[path]) - expected).max() / scale, limit, err_msg=path
        )
    model = from_official(case.tree("params/"), case.config)
    new = vq.update_codebook(model.codebook, terms.codebook, model.config.codebook_decay)
    expected = from_official(
        {
            k: v - case["grads/" + k] if "quantizer" in k else v
            for k, v in case.tree("params/").items()
        },
        case.config,
    ).codebook
    for name in ("sum", "count"):
        close(new[name], expected[name], 1e-9 if case.double else 1e-5)
        assert np.abs(new[name] - model.codebook[name]).max() > 1e-3  # control: it moved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, c: p.pop("out_ln/g"), "no 'out_ln/g'"),
        (lambda p, c: p.update({"other/kernel": np.zeros(3)}), "no place for the parameter"),
        (lambda p, c: c.pop("n_code"), "no field 'n_code'"),
        (lambda p, c: c.update(d_ff=64), "d_ff is 64"),
        (lambda p, c: c.update(n_vocab=18), "has shape"),
    ],
)
def test_misfits_are_refused(change, message):
    case = Case("f32_h1_pe1_tie1_agg1")
    params, config = case.tree("params/"), dict(case.config)
    change(params, config)
    with pytest.raises(ValueError, match=message):
        from_official(params, config)
