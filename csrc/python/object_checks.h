// Whether Python objects are as they were, asked of many at once.
//
// A swapped model asks before each forward. The weights streamed before have left nothing of Python's in
// cache, and 528 look-ups of one short text's model took 0.25 ms through Python's own built-ins. Here the
// objects to come are prefetched.
#pragma once

#include <Python.h>

namespace dynplan {

// types_are(objects, types): type(objects[i]) is types[i] for all i.
// sizes_are(dicts, sizes): len(dicts[i]) == sizes[i] for all i.
// entries_are(dicts, keys, values): dicts[i].get(keys[i]) is values[i] for all i.
// attributes_are(objects, names, values): getattr(objects[i], names[i]) is values[i] for all i.
// dicts_are(objects, dicts): objects[i].__dict__ is dicts[i] for all i; torch.utils.swap_tensors swaps them.
// Their arguments are tuples of one length.
// weights_are_unchanged(handle): see ops/weight_watch.cpp.
extern PyMethodDef object_checks[];

}  // namespace dynplan
