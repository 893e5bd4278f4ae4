# The public names, each beside its home: the one list that type checkers and `__init__.py` read.

from transformer_vq.config import ModelConfig as ModelConfig
from transformer_vq.config import TrainConfig as TrainConfig
from transformer_vq.engine.batch import generate as generate
from transformer_vq.engine.batch import stream as stream
from transformer_vq.engine.request import SamplingParams as SamplingParams
from transformer_vq.engine.request import Token as Token
from transformer_vq.engine.score import score as score
from transformer_vq.io.state import StateError as StateError
from transformer_vq.io.state import load_state as load_state
from transformer_vq.io.state import save_state as save_state
from transformer_vq.nn.extend import extend as extend
from transformer_vq.nn.model import Model as Model
from transformer_vq.nn.model import State as State
from transformer_vq.nn.model import init_model as init_model
from transformer_vq.nn.model import init_state as init_state
from transformer_vq.ops.evaluate import evaluate as evaluate
from transformer_vq.ops.sample import SampleConfig as SampleConfig
from transformer_vq.ops.sample import sample_op as sample_op
from transformer_vq.run.folder import load as load
from transformer_vq.run.loop import train as train
