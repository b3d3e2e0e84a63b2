"""The device: embeds, hides, asks the cloud, reveals and samples. Needs neither torch nor transformers."""

from device_app.answer import Answer, Stats
from device_app.assistant import Assistant
from device_app.encoder import Encoder, Prediction
from device_app.sampler import Sampling

__all__ = ["Answer", "Assistant", "Encoder", "Prediction", "Sampling", "Stats"]
