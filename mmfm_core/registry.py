"""The parts that a document may name: each `type` and the class that describes it. Closed, so a document names no code.

A new encoder, fusion, head or objective is one new file and one line here.
"""

ENCODERS = {
    "vit": "mmfm_core.models.encoders.vit:VisionTransformer",
    "vit3d": "mmfm_core.models.encoders.vit3d:VolumeTransformer",
    "timm": "mmfm_core.models.encoders.timm_trunk:TimmTrunk",
    "bert": "mmfm_core.models.encoders.bert:Bert",
    "feature_tokens": "mmfm_core.models.encoders.feature_tokens:FeatureTokens",
    "shared": "mmfm_core.models.encoders.shared:Shared",
}

FUSIONS = {
    "channels": "mmfm_core.models.fusion.channels:Channels",
    "joint": "mmfm_core.models.fusion.joint:Joint",
    "concat": "mmfm_core.models.fusion.concat:Concat",
    "sum": "mmfm_core.models.fusion.sum:Sum",
    "gated": "mmfm_core.models.fusion.gated:Gated",
    "cross_attention": "mmfm_core.models.fusion.cross_attention:AnchoredAttention",
    "bottleneck": "mmfm_core.models.fusion.bottleneck:Bottleneck",
}

HEADS = {
    "classification": "mmfm_core.models.heads.classification:Classification",
    "findings": "mmfm_core.models.heads.findings:Findings",
    "segmentation": "mmfm_core.models.heads.segmentation:Segmentation",
    "registration": "mmfm_core.models.heads.registration:Registration",
    "detection": "mmfm_core.models.heads.detection:Detection",
    "report": "mmfm_core.models.heads.report:Report",
    "retrieval": "mmfm_core.models.heads.retrieval:Retrieval",
}

OBJECTIVES = {
    "masked_image": "mmfm_core.models.objectives.masked_image:MaskedImage",
    "masked_text": "mmfm_core.models.objectives.masked_text:MaskedText",
    "centre": "mmfm_core.models.objectives.centre:Centre",
    "matching": "mmfm_core.models.objectives.matching:Matching",
}
