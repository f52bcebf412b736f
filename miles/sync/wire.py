"""The body of SGLang's `/update_weights_from_tensor`: a flattened bucket, pickled by reference to shared memory.

SGLang unpickles `{"flattened_tensor": uint8 tensor, "metadata": [FlattenedTensorMetadata, ...]}`. The tensor itself
does not travel: torch's reductions replace it with a handle (a CUDA IPC handle, or the name of a shared-memory
file on a CPU). `dumps` writes exactly that pickle without importing SGLang, whose class is named in the stream.
`loads` is the reader of the embedded engine; it resolves only the few names that such a pickle may contain, so a
hostile body cannot run code in it.
"""
