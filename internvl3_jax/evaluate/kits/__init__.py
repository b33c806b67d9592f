"""Model classes for VLMEvalKit and lmms-eval, which ask the engine of this package.

`vlmevalkit_model` and `lmms_model` import their kit, which must be installed; the rest of the
package does without them.
"""
