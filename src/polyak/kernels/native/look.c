/* Whether dictionaries hold the objects that they held under the same keys, and tensors the memory, dtypes and layouts
 * that they had.
 *
 * Python is asked through functions of its stable ABI, and torch through those that it keeps for compiled models
 * (torch/csrc/inductor/aoti_torch/c/shim.h: "you MUST MAINTAIN ABI compatibility"). All come in as pointers, so that
 * this file is linked against neither. torch's functions take the address of a C++ tensor, which is a part of the
 * Python object: the caller finds its offset, and tries whether changes are detected.
 *
 * The caller has Python's lock, and holds every dictionary and object of a table. Only an object that is the one in the
 * table is looked into. Its type and its address are compared first: a tensor that differs there may be one whose sizes
 * only Python knows, and a thread that asks for them would wait for the lock forever.
 */
#include "common.h"

typedef struct _object PyObject;

/* How Python and torch are asked. */
typedef struct {
    intptr_t (*dict_size)(PyObject *dictionary);
    int (*dict_next)(PyObject *dictionary, intptr_t *position, PyObject **key, PyObject **value);
    PyObject *(*get_attribute)(PyObject *object, PyObject *name);
    void (*release)(PyObject *object);
    void (*clear_error)(void);
    int32_t (*data_ptr)(void *tensor, void **found);
    int32_t (*dim)(void *tensor, int64_t *found);
    int32_t (*sizes)(void *tensor, int64_t **found);
    int32_t (*strides)(void *tensor, int64_t **found);
    int32_t (*dtype)(void *tensor, int32_t *found);
    void (*bump_version)(const void *tensor);
    int64_t offset;         /* of the C++ tensor in the Python object */
    PyObject *local_tensor; /* the name of the attribute that holds the local part of a DTensor */
} Api;

/* Entries of a dictionary from a position on, as many as one thread takes at once. `entries` is where the dictionary
 * keeps them; it is only prefetched, so it may be wrong. */
typedef struct {
    PyObject *dictionary;
    int64_t size, count, first; /* of the dictionary; of these entries; the number of the first of them in all */
    intptr_t position;
    const char *entries;
} Holder;

/* One entry of a dictionary. For a tensor also: `plain`, itself or the local part of a DTensor, with its type, its
 * address and the digest of its dtype, shape and strides; and two addresses inside of torch, which are only prefetched. */
typedef struct {
    PyObject *key, *object, *plain, *type;
    uint64_t place, layout;
    const char *implementation, *storage;
} Seen;

typedef struct {
    const Api *api;
    Holder *holders;
    int64_t num_holders;
    Seen *seen;
    int64_t num_seen;
    int64_t start; /* the first entry that is compared */
    int64_t num_threads;
    int64_t nanoseconds; /* that the look took, if several threads looked */
} Look;

/* Entries whose lines are on their way while others are compared. */
#define AHEAD 16
#define LINE 64

INLINE void fetch(const char *start, int64_t num_bytes)
{
    for (const char *line = start; line < start + num_bytes; line += LINE)
        __builtin_prefetch(line);
    __builtin_prefetch(start + num_bytes - 1);
}

INLINE uint64_t mixed(uint64_t sum, uint64_t number)
{
    sum = (sum ^ number) * 0x9E3779B97F4A7C15u;
    return sum ^ (sum >> 32);
}

/* Returns 0 if torch could tell. */
INLINE int32_t find_place(const Api *api, PyObject *plain, uint64_t *place)
{
    void *address = 0;
    const int32_t wrong = api->data_ptr((char *)plain + api->offset, &address);
    *place = (uint64_t)(intptr_t)address;
    return wrong;
}

/* Returns 0 if torch could tell. */
INLINE int32_t find_layout(const Api *api, PyObject *plain, uint64_t *layout)
{
    void *tensor = (char *)plain + api->offset;
    int64_t num_dims = 0, *sizes = 0, *strides = 0;
    int32_t dtype = 0;
    if (api->dim(tensor, &num_dims) || api->dtype(tensor, &dtype) || api->sizes(tensor, &sizes) ||
        api->strides(tensor, &strides))
        return 1;
    uint64_t sum = mixed((uint64_t)(uint32_t)dtype, (uint64_t)num_dims);
    for (int64_t i = 0; i < num_dims; i++)
        sum = mixed(mixed(sum, (uint64_t)sizes[i]), (uint64_t)strides[i]);
    *layout = sum;
    return 0;
}

/* The second word of every Python object. */
INLINE PyObject *type_of(PyObject *object) { return ((PyObject **)object)[1]; }

/* Notes the address and layout of each tensor, and where sections of dictionaries begin; the first of a dictionary has
 * the position 0. Returns how many tensors have no address, because they are empty, or -1 if torch cannot tell. */
EXPORT int64_t polyak_begin_look(const Look *look)
{
    const Api *api = look->api;
    int64_t num_empty = 0;
    for (int64_t i = 0; i < look->num_seen; i++) {
        Seen *each = look->seen + i;
        if (!each->plain)
            continue;
        if (find_place(api, each->plain, &each->place) || find_layout(api, each->plain, &each->layout))
            return -1;
        each->type = type_of(each->plain);
        num_empty += each->place == 0;
    }
    intptr_t position = 0;
    for (int64_t i = 0; i < look->num_holders; i++) {
        Holder *holder = look->holders + i;
        position = holder->position ? position : 0;
        holder->position = position;
        PyObject *key, *value;
        for (int64_t k = 0; k < holder->count; k++)
            api->dict_next(holder->dictionary, &position, &key, &value);
    }
    return num_empty;
}

/* Whether a DTensor still has this local part; the caller holds the one that it should be. */
static int is_local(const Api *api, PyObject *value, const PyObject *plain)
{
    PyObject *found = api->get_attribute(value, api->local_tensor);
    if (found)
        api->release(found);
    else
        api->clear_error();
    return found == plain;
}

static int is_as_it_was(const Api *api, const Seen *each)
{
    uint64_t place, layout;
    return type_of(each->plain) == each->type && !find_place(api, each->plain, &place) && place == each->place &&
           !find_layout(api, each->plain, &layout) && layout == each->layout;
}

#define NO_CHANGE INT64_MAX

/* The number of the first entry that changed, or that of all entries if the dictionary has another size. */
static int64_t find_change(const Look *look, const Holder *holder)
{
    const Api *api = look->api;
    if (holder + AHEAD < look->holders + look->num_holders) {
        __builtin_prefetch(holder[AHEAD].dictionary);
        if (holder[AHEAD].count)
            fetch(holder[AHEAD].entries, 128);
    }
    if (api->dict_size(holder->dictionary) != holder->size)
        return look->num_seen;
    intptr_t position = holder->position;
    for (int64_t i = holder->first; i < holder->first + holder->count; i++) {
        const Seen *each = look->seen + i;
        PyObject *key, *value;
        if (!api->dict_next(holder->dictionary, &position, &key, &value))
            return look->num_seen;
        if (i < look->start)
            continue;
        if (key != each->key || value != each->object)
            return i;
        if (!each->plain)
            continue;
        if (i + AHEAD < look->num_seen && each[AHEAD].plain) {
            __builtin_prefetch((const char *)each[AHEAD].plain + api->offset);
            fetch(each[AHEAD].implementation, 192);
            fetch(each[AHEAD].storage, 72);
        }
        if (each->plain != value && !is_local(api, value, each->plain))
            return i;
        if (!is_as_it_was(api, each))
            return i;
    }
    return NO_CHANGE;
}

/* Returns -1 if everything is as it was, else the number of the first entry that changed, or that of all entries.
 * Several threads may look, because the one that has Python's lock waits for them and none changes a Python object.
 * With DTensors, whose attributes are read, only one may, and with empty tensors, whose address tells nothing. */
EXPORT int64_t polyak_look(Look *look)
{
    const int num_threads = (int)look->num_threads;
    int64_t changed = NO_CHANGE;
    if (num_threads == 1) {
        for (int64_t i = 0; changed == NO_CHANGE && i < look->num_holders; i++)
            changed = find_change(look, look->holders + i);
        return changed == NO_CHANGE ? -1 : changed;
    }
    const int64_t started = nanoseconds();
    _Pragma("omp parallel for schedule(static) reduction(min : changed) num_threads(num_threads)")
    for (int64_t i = 0; i < look->num_holders; i++) {
        const int64_t found = changed == NO_CHANGE ? find_change(look, look->holders + i) : NO_CHANGE;
        changed = found < changed ? found : changed;
    }
    look->nanoseconds = nanoseconds() - started;
    return changed == NO_CHANGE ? -1 : changed;
}

/* Counts a change of each tensor, as torch's operations in place do; none may be an inference tensor. */
EXPORT void polyak_count_changes(const Api *api, PyObject *const *tensors, int64_t num_tensors)
{
    for (int64_t i = 0; i < num_tensors; i++) {
        if (i + AHEAD < num_tensors)
            __builtin_prefetch((const char *)tensors[i + AHEAD] + api->offset);
        api->bump_version((const char *)tensors[i] + api->offset);
    }
}
