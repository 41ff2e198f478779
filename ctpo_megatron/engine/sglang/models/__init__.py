"""The models this package trains, registered with SGLang through SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang resolves registered models without importing its other two hundred, which saves seconds of every start; an
architecture that is not here is still found in SGLang's own registry.
"""
