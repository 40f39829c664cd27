"""The registration of the networks with AutoModel and AutoModelForImageClassification."""

from transformers import AutoModel, AutoModelForImageClassification

from inlay.bases.networks.configs import ShuffleNetV1Config, ShuffleNetV2Config, SqueezeNetConfig
from inlay.bases.networks.shufflenet_v1 import ShuffleNetV1ForImageClassification, ShuffleNetV1Model
from inlay.bases.networks.shufflenet_v2 import ShuffleNetV2ForImageClassification, ShuffleNetV2Model
from inlay.bases.networks.squeezenet import SqueezeNetForImageClassification, SqueezeNetModel

for _config, _backbone, _classifier in (
    (SqueezeNetConfig, SqueezeNetModel, SqueezeNetForImageClassification),
    (ShuffleNetV1Config, ShuffleNetV1Model, ShuffleNetV1ForImageClassification),
    (ShuffleNetV2Config, ShuffleNetV2Model, ShuffleNetV2ForImageClassification),
):
    AutoModel.register(_config, _backbone, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
