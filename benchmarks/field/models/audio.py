"""Speech and audio: speechbrain, torchaudio, encodec, vocos."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output

CASES = Registry(__name__)


def _ctc(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """CTC with blank 0, of frames' logits (batch, time, tokens)."""
    frames = torch.full((len(out),), out.shape[1], dtype=torch.long)
    words = torch.full((len(out),), target.shape[1], dtype=torch.long)
    return F.ctc_loss(out.float().log_softmax(-1).transpose(0, 1), target, frames, words, zero_infinity=True)


@CASES("speechbrain")
def ecapa_speaker() -> Setup:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

    sizes = {"channels": [16, 16, 16, 16, 48], "kernel_sizes": [5, 3, 3, 3, 1], "dilations": [1, 2, 3, 4, 1]}
    body = ECAPA_TDNN(20, lin_neurons=24, attention_channels=8, res2net_scale=4, se_channels=8, **sizes)
    angular = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))
    data = batches(lambda: call(torch.randn(4, 30, 20), target=torch.randint(6, (4, 1))))
    return Setup(nn.Sequential(body, Classifier(24, out_neurons=6)), data, on_output(angular))


@CASES("speechbrain")
def crdnn_ctc() -> Setup:
    from speechbrain.lobes.models.CRDNN import CRDNN

    rnn = {"rnn_layers": 1, "rnn_neurons": 16, "dnn_blocks": 1, "dnn_neurons": 16}
    body = CRDNN(input_size=20, cnn_blocks=1, cnn_channels=(8,), **rnn)
    data = batches(lambda: call(torch.randn(2, 40, 20), target=torch.randint(1, 9, (2, 5))))
    return Setup(nn.Sequential(body, nn.Linear(16, 9)), data, on_output(_ctc))


@CASES("speechbrain")
def transformer_asr() -> Setup:
    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

    size = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "d_ffn": 32, "dropout": 0.1}
    net = TransformerASR(tgt_vocab=12, input_size=20, **size)

    class Asr(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = net, nn.Linear(16, 12)

        def forward(self, sound: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(sound, words, wav_len=torch.ones(len(sound)))[1])

    def make() -> Batch:
        words = torch.randint(1, 12, (2, 6))
        return call(torch.randn(2, 20, 20), words, target=words)

    return Setup(Asr(), batches(make), lambda module, out, target: F.cross_entropy(out.transpose(1, 2), target))


@CASES("speechbrain")
def separation_dual_path() -> Setup:
    """Dual-path separation with a permutation-invariant loss."""
    from speechbrain.lobes.models.dual_path import Decoder, Dual_Path_Model, Encoder, SBTransformerBlock
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    class Separator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Encoder(8, 16), Decoder(16, 1, 8, stride=4, bias=False)
            blocks = [SBTransformerBlock(num_layers=1, d_model=16, nhead=2, d_ffn=32, dropout=0.1) for _ in range(2)]
            self.masks = Dual_Path_Model(16, 16, *blocks, num_layers=1, norm="ln", K=10, num_spks=2)

        def forward(self, mixture: torch.Tensor) -> torch.Tensor:
            encoded = self.encoder(mixture)
            separate = self.masks(encoded) * encoded[None]
            sources = torch.cat([self.decoder(separate[i])[..., None] for i in range(2)], -1)
            return F.pad(sources, (0, 0, 0, mixture.shape[1] - sources.shape[1]))

    def make() -> Batch:
        sources = torch.randn(2, 160, 2)
        return call(sources.sum(-1), target=sources)

    def loss(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = get_si_snr_with_pitwrapper(target, out).mean()
        return value

    return Setup(Separator(), batches(make), loss)


@CASES("torchaudio")
def conv_tasnet() -> Setup:
    from torchaudio.models import ConvTasNet

    size = {"enc_kernel_size": 8, "enc_num_feats": 16, "msk_num_feats": 8, "msk_num_hidden_feats": 16}
    model = ConvTasNet(num_sources=2, **size, msk_num_layers=2, msk_num_stacks=1)
    data = batches(lambda: call(torch.randn(2, 1, 128), target=torch.randn(2, 2, 128)))
    return Setup(model, data, on_output(F.l1_loss))


@CASES("torchaudio")
def conformer_ctc() -> Setup:
    from torchaudio.models import Conformer

    body = Conformer(input_dim=16, num_heads=2, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=7, dropout=0.1)

    class Ctc(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(16, 9)

        def forward(self, sound: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(sound, lengths)[0])

    data = batches(lambda: call(torch.randn(2, 30, 16), torch.tensor([30, 22]), target=torch.randint(1, 9, (2, 5))))
    return Setup(Ctc(), data, on_output(_ctc))


@CASES("torchaudio")
def wav2vec_layer_drop() -> Setup:
    """Layers are skipped by torch's generator, read on the host."""
    from torchaudio.models import wav2vec2_model

    shape = {"extractor_mode": "group_norm", "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)]}
    encoder = {
        "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 32,
        "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.2,
    }
    model = wav2vec2_model(**shape, extractor_conv_bias=False, **encoder, aux_num_out=9)
    data = batches(lambda: call(torch.randn(2, 400), target=torch.randint(1, 9, (2, 5))))
    return Setup(model, data, lambda module, out, target: _ctc(out[0], target))


@CASES("torchaudio")
def spectrogram_classifier() -> Setup:
    """Mel features and SpecAugment in the model."""
    from torchaudio.transforms import FrequencyMasking, MelSpectrogram, TimeMasking

    features = nn.Sequential(MelSpectrogram(8000, n_fft=128, n_mels=16), FrequencyMasking(4), TimeMasking(8))
    net = nn.Sequential(nn.BatchNorm1d(16), nn.Conv1d(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    data = batches(lambda: call(torch.randn(4, 1600), target=torch.randint(5, (4,))))
    return Setup(nn.Sequential(features, net, nn.Linear(24, 5)), data, on_output(F.cross_entropy))


@CASES("encodec", precisions=("fp32",))  # its codebooks are float32
def neural_codec() -> Setup:
    """SEANet around a residual quantizer whose codebooks are initialized by k-means and moved by averages."""
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size = {"dimension": 16, "n_filters": 4, "n_residual_layers": 1, "ratios": [4, 2], "lstm": 1}
            self.encoder, self.decoder = SEANetEncoder(**size), SEANetDecoder(**size)
            self.quantizer = ResidualVectorQuantizer(dimension=16, n_q=2, bins=8)

        def forward(self, sound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            quantized = self.quantizer(self.encoder(sound), sample_rate=10)
            return self.decoder(quantized.quantized), quantized.penalty

    def make() -> Batch:
        sound = torch.randn(2, 1, 160)
        return call(sound, target=sound)

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(out[0], target) + out[1]

    return Setup(Codec(), batches(make), loss, copied=False)  # its weight norm leaves a computed weight on the module


@CASES("vocos")
def vocoder() -> Setup:
    """ConvNeXt backbone and inverse STFT head."""
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone

    backbone = VocosBackbone(input_channels=12, dim=24, intermediate_dim=48, num_layers=2)
    model = nn.Sequential(backbone, ISTFTHead(dim=24, n_fft=32, hop_length=8, padding="same"))
    data = batches(lambda: call(torch.randn(2, 12, 20), target=torch.randn(2, 160)))
    return Setup(model, data, on_output(F.l1_loss))
