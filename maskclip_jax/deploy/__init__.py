"""Models for other people's runtimes and for the hub: StableHLO and ONNX files, model cards."""
