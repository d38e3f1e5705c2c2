/* model.onnx: only what exports write, checked before ONNX Runtime opens it.
 *
 * A graph is a program: it can loop for ever, make a tensor of any size out of one number, or name
 * any file as its weights. This is the check that the Python runtime makes too (onnx_file.py and
 * graph_file.py), with the same verdicts: a walk over the messages of onnx.proto, in which fields,
 * operators and types that exports do not write are refused.
 * https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
 */
#ifndef LLAMA_ONNX_GRAPH_H
#define LLAMA_ONNX_GRAPH_H

#include "config.h"
#include "files.h"

#define DATA_FILE MODEL_FILE ".data"

enum {
    GRAPH_BYTES = 16 << 20, /* of the whole file */
    GRAPH_FIELDS = 300000,  /* of all its messages */
    GRAPH_JOINED = 8,       /* tensors that a Concat joins */
    GRAPH_FOLDS = 4,        /* operators in a row that convert weights */
    GRAPH_READERS = 2,      /* operators that convert the same weights */
    GRAPH_TABLE = 1 << 24,  /* values of a rotary table that the graph computes */
    GRAPH_DIMENSIONS = 8,
    GRAPH_TEXT = 1024, /* bytes of a name */
    GRAPH_DIGITS = 18,
    GRAPH_INPUT = 1 << 24 /* values of an input or output at one position */
};
#define GRAPH_DIMENSION ((uint64_t)1 << 31)
#define GRAPH_TOO_LARGE UINT64_MAX

#define MICROSOFT "com.microsoft"

/* Domain and name of each operator. A test compares them with graph_operators.py, which says what
 * to consider before one is added. */
#define GRAPH_OPERATORS(O)                                                                          \
    O("", "Add") O("", "And") O("", "ArgMax") O("", "Attention") O("", "Cast") O("", "Concat")     \
    O("", "Cos")                                                                                   \
    O("", "CumSum") O("", "DequantizeLinear") O("", "Equal") O("", "Gather")                       \
    O("", "GatherElements") O("", "GatherND") O("", "GreaterOrEqual") O("", "LessOrEqual")         \
    O("", "MatMul") O("", "Max") O("", "Mod") O("", "Mul") O("", "Neg") O("", "Or")                \
    O("", "RMSNormalization") O("", "Range") O("", "ReduceMax")                                    \
    O("", "ReduceSum") O("", "RotaryEmbedding") O("", "Shape") O("", "Sigmoid")                    \
    O("", "SimplifiedLayerNormalization") O("", "Sin") O("", "Slice") O("", "Split") O("", "Squeeze")           \
    O("", "Sub") O("", "Transpose") O("", "Unsqueeze")                                             \
    O(MICROSOFT, "FusedMatMul") O(MICROSOFT, "GatherBlockQuantized")                               \
    O(MICROSOFT, "GroupQueryAttention") O(MICROSOFT, "MatMulNBits") O(MICROSOFT, "QuickGelu")      \
    O(MICROSOFT, "RotaryEmbedding") O(MICROSOFT, "SkipSimplifiedLayerNormalization")

static const struct graph_operator {
    const char *domain, *name;
} graph_operators[] = {
#define ENTRY(domain, name) {domain, name},
    GRAPH_OPERATORS(ENTRY)
#undef ENTRY
};

/* Bytes of the file. */
typedef struct graph_span {
    const uint8_t *at, *end;
} graph_span;

static const uint8_t graph_nothing[1];
#define GRAPH_EMPTY {graph_nothing, graph_nothing}

/* What is known of a name. */
typedef enum {
    GRAPH_OTHER,
    GRAPH_SQUEEZE, /* the output of a Squeeze of `of.input` */
    GRAPH_SHAPE,   /* the output of a Shape */
    GRAPH_PRODUCT, /* the output of a MatMul or FusedMatMul */
    GRAPH_CAST,    /* the output of an operator that may work on weights alone, the first input */
    GRAPH_MUL,     /* of which is `of.input`: Cast, Mul, Cos or Sin, or another one */
    GRAPH_WAVE,
    GRAPH_FOLDED,
    GRAPH_SMALL, /* integers in the graph, from -1 to 1 */
    GRAPH_LARGE  /* other integers in the graph */
} graph_what;

typedef struct graph_name {
    graph_span name;
    size_t order;
    graph_what what;
    int rank; /* of an input, an output or weights; of what a node makes, its number of inputs */
    unsigned kind; /* of weights: their TensorProto.DataType */
    union {
        struct {
            graph_span input, second;
        };
        int64_t dims[4]; /* the first of an input, an output or weights; -1 is one that varies */
    } of;
} graph_name;

typedef struct graph_names {
    graph_name *all;
    size_t count, room;
} graph_names;

typedef struct graph {
    size_t fields_left;
    uint64_t data_size, data_used;
    graph_names tensors, made, inputs, outputs;
    graph_names ranges, joined, reads; /* what Range, Concat, and all but those in `folds` read */
    graph_names folds; /* operators that may work on weights alone, by the name of what they read */
    int nodes;
    int64_t layers, heads, head_size, vocab_size;
    bool wrong;
    char *why; /* WHY characters, to follow the file's name */
} graph;

static bool graph_wrong(graph *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (!self->wrong) vsnprintf(self->why, WHY, format, arguments);
    va_end(arguments);
    self->wrong = true;
    return false;
}

/* ---- the wire format -------------------------------------------------------------------------- */

typedef struct graph_field {
    unsigned number;
    bool is_bytes;
    uint64_t value;   /* of a number */
    graph_span bytes; /* of anything else */
} graph_field;

/* A message that is being read. `once` and `many` have a bit for each field that it may have. */
typedef struct graph_message {
    graph_span rest;
    const char *kind;
    uint32_t once, many, seen;
    bool fixed; /* whether fields of fixed size may be there */
} graph_message;

#define FIELD(number) ((uint32_t)1 << (number))

static size_t span_size(graph_span span) { return (size_t)(span.end - span.at); }

static bool span_is(graph_span span, const char *text) {
    size_t size = strlen(text);
    return span_size(span) == size && memcmp(span.at, text, size) == 0;
}

static bool span_same(graph_span a, graph_span b) {
    return span_size(a) == span_size(b) && memcmp(a.at, b.at, span_size(a)) == 0;
}

static bool span_starts(graph_span span, const char *text) {
    size_t size = strlen(text);
    return span_size(span) >= size && memcmp(span.at, text, size) == 0;
}

/* For messages: the arguments of "%.*s". */
#define SHOWN(span) (int)(span_size(span) < 100 ? span_size(span) : 100), (const char *)(span).at

static bool graph_varint(graph *self, graph_span *from, uint64_t *out) {
    *out = 0;
    for (unsigned shift = 0; from->at < from->end; shift += 7) {
        uint8_t byte = *from->at++;
        if (shift == 63 && byte > 1) {
            return graph_wrong(self, "is not an ONNX model (a number of more than 64 bits)");
        }
        *out |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return true;
    }
    return graph_wrong(self, "is not an ONNX model (a cut number)");
}

/* Reads what follows a field's tag. */
static bool graph_value(graph *self, graph_span *from, unsigned wire, graph_field *out) {
    uint64_t length = wire == 1 ? 8 : 4;
    out->is_bytes = wire != 0;
    if (wire == 0) return graph_varint(self, from, &out->value);
    if (wire != 1 && wire != 2 && wire != 5) {
        return graph_wrong(self, "is not an ONNX model (wire type %u)", wire);
    }
    if (wire == 2 && !graph_varint(self, from, &length)) return false;
    if (length > span_size(*from)) {
        return graph_wrong(self, "is not an ONNX model (a field longer than its message)");
    }
    out->bytes = (graph_span){from->at, from->at + (size_t)length};
    from->at = out->bytes.end;
    return true;
}

/* Reads the next field. Returns false at the message's end, or if something is wrong. */
static bool graph_next(graph *self, graph_message *message, graph_field *out) {
    uint64_t tag;
    if (self->wrong || message->rest.at == message->rest.end) return false;
    if (!graph_varint(self, &message->rest, &tag)) return false;
    unsigned wire = (unsigned)(tag & 7);
    uint32_t bit = tag >> 3 < 32 ? FIELD(tag >> 3) : 0;
    out->number = (unsigned)(tag >> 3 & 0xffffffff);
    if (!out->number || tag >> 3 >= FIELD(29)) {
        return graph_wrong(self, "is not an ONNX model (field number %u)", out->number);
    }
    if (!(bit & (message->once | message->many))) {
        return graph_wrong(self, "has field %u of ONNX's %s, which no export writes", out->number,
                           message->kind);
    }
    if (bit & message->once & message->seen) {
        return graph_wrong(self, "has field %u of ONNX's %s twice", out->number, message->kind);
    }
    if (!self->fields_left) return graph_wrong(self, "has more than %d fields", GRAPH_FIELDS);
    if ((wire == 1 || wire == 5) && !message->fixed) {
        /* A library takes a text of this type for an unknown field, and does not see it. */
        return graph_wrong(self, "is not an ONNX model (a number of fixed size in a %s)",
                           message->kind);
    }
    message->seen |= bit;
    self->fields_left--;
    return graph_value(self, &message->rest, wire, out);
}

static bool graph_enter(graph *self, const graph_field *field, const char *kind, uint32_t once,
                        uint32_t many, graph_message *out) {
    *out = (graph_message){field->bytes, kind, once, many, 0, false};
    if (field->is_bytes) return true;
    out->rest = (graph_span){NULL, NULL};
    return graph_wrong(self, "is not an ONNX model (a number instead of a %s)", kind);
}

static bool graph_text(graph *self, const graph_field *field, graph_span *out) {
    if (!field->is_bytes) return graph_wrong(self, "is not an ONNX model (a number as a text)");
    if (span_size(field->bytes) > GRAPH_TEXT) {
        /* A hundred thousand operators could name a tensor whose name is compared each time. */
        return graph_wrong(self, "has a name or text of %zu bytes, which no export writes",
                           span_size(field->bytes));
    }
    if (!is_utf8((const char *)field->bytes.at, span_size(field->bytes))) {
        return graph_wrong(self, "is not an ONNX model (a text that is not UTF-8)");
    }
    for (const uint8_t *at = field->bytes.at; at < field->bytes.end; at++) {
        /* ONNX Runtime prints the names of nodes that fail, and a terminal would obey them. */
        if (*at < ' ' || *at > '~') {
            return graph_wrong(self, "has a name or text beyond printable ASCII, which no export "
                                     "writes");
        }
    }
    *out = field->bytes;
    return true;
}

static bool graph_number(graph *self, const graph_field *field, uint64_t *out) {
    if (field->is_bytes) return graph_wrong(self, "is not an ONNX model (bytes as a number)");
    *out = field->value;
    return true;
}

/* ---- lists of names --------------------------------------------------------------------------- */

static graph_name *graph_add(graph *self, graph_names *list, graph_span name) {
    if (list->count == list->room) {
        size_t room = list->room ? list->room * 2 : 64;
        graph_name *grown = realloc(list->all, room * sizeof *grown);
        if (!grown) {
            graph_wrong(self, "does not fit into memory");
            return NULL;
        }
        list->all = grown;
        list->room = room;
    }
    graph_name *out = &list->all[list->count];
    *out = (graph_name){.name = name, .order = list->count++};
    return out;
}

static int graph_compare_spans(graph_span a, graph_span b) {
    size_t left = span_size(a), right = span_size(b), both = left < right ? left : right;
    int order = both ? memcmp(a.at, b.at, both) : 0;
    return order ? order : (left > right) - (left < right);
}

static bool graph_before(const graph_name *a, const graph_name *b) {
    int order = graph_compare_spans(a->name, b->name);
    return order ? order < 0 : a->order < b->order;
}

static void graph_sift(graph_name *names, size_t root, size_t count) {
    for (size_t child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && graph_before(&names[child], &names[child + 1])) child++;
        if (!graph_before(&names[root], &names[child])) return;
        graph_name moved = names[root];
        names[root] = names[child];
        names[child] = moved;
    }
}

/* Sorts by name, then by order. Some libraries' qsort() takes hours for an order that was made for
 * it; this one is a heapsort, which is as fast for every order. */
static void graph_sort(graph_names *list) {
    for (size_t i = list->count / 2; i-- > 0;) graph_sift(list->all, i, list->count);
    for (size_t end = list->count; end > 1;) {
        graph_name largest = list->all[0];
        list->all[0] = list->all[--end];
        list->all[end] = largest;
        graph_sift(list->all, 0, end);
    }
}

/* The last entry with `name` in a sorted list; NULL if there is none. */
static const graph_name *graph_find(const graph_names *list, graph_span name) {
    size_t low = 0, high = list->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (graph_compare_spans(list->all[middle].name, name) <= 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    bool found = low && graph_compare_spans(list->all[low - 1].name, name) == 0;
    return found ? &list->all[low - 1] : NULL;
}

/* Sorts a list in which no name may be there twice. */
static bool graph_unique(graph *self, graph_names *list, const char *kind) {
    graph_sort(list);
    for (size_t i = 1; i < list->count; i++) {
        if (graph_compare_spans(list->all[i - 1].name, list->all[i].name) == 0) {
            return graph_wrong(self, "has the %s '%.*s' twice", kind, SHOWN(list->all[i].name));
        }
    }
    return true;
}

/* ---- operators -------------------------------------------------------------------------------- */

static bool graph_attribute(graph *self, const graph_field *field) {
    graph_message message;
    graph_field inner;
    graph_span text;
    uint64_t type = 0;
    /* Without 5 (a tensor), 6 (a graph) and lists of texts: no operator above has one. */
    uint32_t once = FIELD(1) | FIELD(2) | FIELD(3) | FIELD(4) | FIELD(13) | FIELD(20);
    if (!graph_enter(self, field, "attribute", once, FIELD(7) | FIELD(8), &message)) return false;
    message.fixed = true;
    while (graph_next(self, &message, &inner)) {
        if (inner.number == 20) graph_number(self, &inner, &type);
        if (inner.number != 4 || !graph_text(self, &inner, &text)) continue;
        if (!span_is(text, "PER_CHANNEL")) { /* of a cache in int8 */
            return graph_wrong(self, "has an attribute with a text that no export writes");
        }
    }
    if (!self->wrong && type != 1 && type != 2 && type != 3 && type != 7) {
        /* float, int, text, ints */
        graph_wrong(self, "has an attribute of a type that no export writes");
    }
    return !self->wrong;
}

static bool graph_operator(graph *self, graph_span domain, graph_span name) {
    for (size_t i = 0; i < sizeof graph_operators / sizeof *graph_operators; i++) {
        if (span_is(domain, graph_operators[i].domain) && span_is(name, graph_operators[i].name)) {
            return true;
        }
    }
    return graph_wrong(self, "has the operator '%.*s%s%.*s', which no export writes", SHOWN(domain),
                       span_size(domain) ? "." : "", SHOWN(name));
}

/* Keeps the names that a node reads; `message` has been read once. */
static bool graph_keep(graph *self, graph_message message, graph_names *list) {
    graph_field field;
    size_t left = self->fields_left;
    self->fields_left = GRAPH_FIELDS; /* they are counted already */
    while (graph_next(self, &message, &field)) {
        graph_name *kept = field.number == 1 ? graph_add(self, list, field.bytes) : NULL;
        if (kept) kept->rank = self->nodes;
    }
    self->fields_left = left;
    return !self->wrong;
}

/* What the operator `name` makes; GRAPH_OTHER if it may not work on weights alone. */
static graph_what graph_folds(graph_span name) {
    if (span_is(name, "Cast")) return GRAPH_CAST;
    if (span_is(name, "Mul")) return GRAPH_MUL;
    if (span_is(name, "Cos") || span_is(name, "Sin")) return GRAPH_WAVE;
    bool folds = span_is(name, "Transpose") || span_is(name, "DequantizeLinear");
    return folds ? GRAPH_FOLDED : GRAPH_OTHER;
}

static bool graph_node(graph *self, const graph_field *field) {
    graph_message message, again;
    graph_field part;
    graph_span text, name = GRAPH_EMPTY, domain = name, input = name, second = name;
    size_t first = self->made.count;
    int reads = 0;
    uint32_t many = FIELD(1) | FIELD(2) | FIELD(5) | FIELD(9);
    if (!graph_enter(self, field, "node", FIELD(3) | FIELD(4) | FIELD(6) | FIELD(7), many,
                     &message)) {
        return false;
    }
    again = message;
    while (graph_next(self, &message, &part)) {
        if (part.number == 1 && graph_text(self, &part, &text)) {
            if (reads == 0) input = text;
            if (reads == 1) second = text;
            if (reads < 3) reads++;
        } else if (part.number == 2 && graph_text(self, &part, &text)) {
            graph_add(self, &self->made, text);
        } else if (part.number == 3) {
            graph_text(self, &part, &text); /* its name, which messages quote */
        } else if (part.number == 4) {
            graph_text(self, &part, &name);
        } else if (part.number == 5) {
            graph_attribute(self, &part);
        } else if (part.number == 7) {
            graph_text(self, &part, &domain);
        }
    }
    if (self->wrong || !graph_operator(self, domain, name)) return false;
    self->nodes++;
    graph_what folds = graph_folds(name);
    for (size_t i = first; i < self->made.count; i++) {
        graph_name *made = &self->made.all[i];
        if (span_is(name, "Shape")) made->what = GRAPH_SHAPE;
        if (span_is(name, "MatMul") || span_is(name, "FusedMatMul")) made->what = GRAPH_PRODUCT;
        if (span_is(name, "Squeeze") && reads) made->what = GRAPH_SQUEEZE;
        if (folds && reads) made->what = folds;
        made->rank = reads;
        made->of.input = input;
        made->of.second = second;
    }
    if (span_is(name, "Range") && !graph_keep(self, again, &self->ranges)) return false;
    if (span_is(name, "Concat") && !graph_keep(self, again, &self->joined)) return false;
    if (!folds) return graph_keep(self, again, &self->reads);
    graph_name *fold = reads ? graph_add(self, &self->folds, input) : NULL;
    if (fold) {
        fold->what = folds;
        fold->rank = reads;
        fold->of.input = input;
        fold->of.second = second;
    }
    return !self->wrong;
}

/* Whether `name` is the length of a tensor, or a number from -1 to 1. */
static bool graph_is_small(const graph *self, graph_span name) {
    const graph_name *tensor = graph_find(&self->tensors, name);
    if (tensor && tensor->what != GRAPH_OTHER) return tensor->what == GRAPH_SMALL;
    const graph_name *squeeze = graph_find(&self->made, name);
    if (!squeeze || squeeze->what != GRAPH_SQUEEZE) return false;
    const graph_name *shape = graph_find(&self->made, squeeze->of.input);
    return shape && shape->what == GRAPH_SHAPE;
}

/* Range is the one operator that makes a tensor of any size out of numbers. */
static bool graph_ranges(graph *self) {
    graph_sort(&self->made);
    for (size_t i = 0; i < self->ranges.count; i++) {
        if (!graph_is_small(self, self->ranges.all[i].name)) {
            return graph_wrong(self, "has a Range whose length is not that of an input");
        }
    }
    return true;
}

/* Concat joins the products of an adapter's parts, and nothing else: what it makes of its own output
 * would double with each. */
static bool graph_joins(graph *self) {
    for (size_t i = 0; i < self->joined.count; i++) {
        const graph_name *one = &self->joined.all[i], *made = graph_find(&self->made, one->name);
        bool sound = made && made->what == GRAPH_PRODUCT;
        size_t others = 0; /* before it, of the same node */
        while (sound && others < i && one[-1 - (long)others].rank == one->rank) {
            sound = !span_same(one[-1 - (long)others].name, one->name) && ++others < GRAPH_JOINED;
        }
        if (!sound) return graph_wrong(self, "has a Concat of something else than a few products");
    }
    return true;
}

/* Whether `name` is in the graph, or made of such a tensor by a few operators that may be. */
static bool graph_is_constant(graph *self, graph_span name) {
    for (int step = 0; step <= GRAPH_FOLDS; step++) {
        if (graph_find(&self->tensors, name)) return true;
        const graph_name *made = graph_find(&self->made, name);
        if (!made || made->what < GRAPH_CAST) return false;
        name = made->of.input;
    }
    graph_wrong(self, "converts weights in many steps, which no export writes");
    return true;
}

/* Whether `node` makes the angles of the rotary embedding: positions [n, 1] times
 * frequencies [1, h]. */
static bool graph_is_table(const graph *self, const graph_name *node) {
    if (node->what != GRAPH_MUL || node->rank != 2) return false;
    const graph_name *rows = graph_find(&self->tensors, node->of.input);
    const graph_name *columns = graph_find(&self->tensors, node->of.second);
    if (!rows || !columns || rows->kind != 1 || columns->kind != 1) return false;
    if (rows->rank != 2 || columns->rank != 2) return false;
    if (rows->of.dims[1] != 1 || columns->of.dims[0] != 1) return false;
    return (uint64_t)rows->of.dims[0] * (uint64_t)columns->of.dims[1] <= GRAPH_TABLE;
}

/* The weights that a Cast makes `name` of; NULL if there are none. */
static const graph_name *graph_cast(const graph *self, graph_span name) {
    const graph_name *cast = graph_find(&self->made, name);
    return cast && cast->what == GRAPH_CAST ? graph_find(&self->tensors, cast->of.input) : NULL;
}

/* Whether `node` multiplies numbers of blocks, uint8 [N, blocks], by factors of rows,
 * bfloat16 [N, 1]. */
static bool graph_is_scales(const graph *self, const graph_name *node) {
    const graph_name *blocks = graph_cast(self, node->of.input);
    const graph_name *rows = graph_cast(self, node->of.second);
    if (!blocks || !rows || blocks->kind != 2 || rows->kind != 16) return false;
    if (blocks->rank != 2 || rows->rank != 2) return false;
    return blocks->of.dims[0] == rows->of.dims[0] && rows->of.dims[1] == 1;
}

/* Whether exports write `node`, whose first input is constant. What converts a tensor makes no more
 * of it. A product can: that of a column and a row has as many values as both lengths multiplied. */
static bool graph_is_written(const graph *self, const graph_name *node) {
    const graph_name *made = graph_find(&self->made, node->of.input);
    if (node->what == GRAPH_WAVE) return made && graph_is_table(self, made);
    if (node->what != GRAPH_MUL) return true;
    if (node->rank != 2) return false;
    if (made && made->what == GRAPH_WAVE) {
        const graph_name *factor = graph_find(&self->tensors, node->of.second);
        if (!factor || factor->kind != 1 || factor->rank > 1) return false;
        return !factor->rank || factor->of.dims[0] == 1;
    }
    return graph_is_table(self, node) || graph_is_scales(self, node);
}

/* Checks operators that may work on weights alone, if they do. */
static bool graph_conversions(graph *self) {
    const graph_names *folds = &self->folds;
    int readers = 0, tables = 0;
    graph_sort(&self->folds);
    for (size_t i = 0; i < folds->count; i++) {
        const graph_name *node = &folds->all[i];
        bool same = i && graph_compare_spans(node->name, folds->all[i - 1].name) == 0;
        readers = same ? readers + 1 : 1;
        if (!graph_is_constant(self, node->name)) continue;
        if (!graph_is_written(self, node)) {
            return graph_wrong(self, "computes with weights alone, which no export writes");
        }
        tables += graph_is_table(self, node);
        if (readers > GRAPH_READERS || tables > 1) {
            return graph_wrong(self, "converts the same weights again and again");
        }
    }
    return !self->wrong;
}

/* ONNX Runtime computes what depends on no input while it opens a graph, whatever that takes. */
static bool graph_constants(graph *self) {
    const graph_names *reads = &self->reads;
    for (size_t i = 0; i < reads->count;) {
        int node = reads->all[i].rank;
        bool constant = true, any = false;
        for (; i < reads->count && reads->all[i].rank == node; i++) {
            if (!span_size(reads->all[i].name)) continue; /* an input that is left out */
            any = true;
            constant = constant && graph_is_constant(self, reads->all[i].name);
        }
        if (any && constant) {
            return graph_wrong(self, "computes with weights alone, which no export writes");
        }
    }
    return graph_conversions(self);
}

/* ---- weights and constants -------------------------------------------------------------------- */

/* A tensor as it is read. */
typedef struct graph_tensor {
    graph_span name, raw;
    uint64_t kind, place, offset, length;
    uint64_t dims[GRAPH_DIMENSIONS];
    size_t rank;
    unsigned entries; /* which of location, offset and length there are, as bits */
} graph_tensor;

/* Bits of a TensorProto.DataType; 0 for those that no export writes. */
static unsigned graph_bits(uint64_t kind) {
    switch (kind) {
    case 1: case 6: return 32;   /* float, int32 */
    case 7: return 64;           /* int64 */
    case 10: case 16: return 16; /* float16, bfloat16 */
    case 2: case 3: return 8;    /* uint8, int8 */
    case 21: case 22: return 4;  /* uint4, int4 */
    default: return 0;
    }
}

static bool graph_dimension(graph *self, graph_tensor *tensor, uint64_t value) {
    if (tensor->rank == GRAPH_DIMENSIONS || value > GRAPH_DIMENSION) {
        return graph_wrong(self, "has weights of a shape that no export writes");
    }
    tensor->dims[tensor->rank++] = value;
    return true;
}

/* Reads one length, or several that are packed. */
static bool graph_dimensions(graph *self, graph_tensor *tensor, graph_field *field) {
    uint64_t value;
    if (!field->is_bytes) return graph_dimension(self, tensor, field->value);
    while (field->bytes.at < field->bytes.end) {
        if (!graph_varint(self, &field->bytes, &value)) return false;
        if (!graph_dimension(self, tensor, value)) return false;
    }
    return true;
}

/* The bytes that a tensor needs; GRAPH_TOO_LARGE for more than any file has. */
static uint64_t graph_size(const graph_tensor *tensor) {
    uint64_t values = 1;
    for (size_t i = 0; i < tensor->rank; i++) {
        if (!tensor->dims[i]) return 0;
    }
    for (size_t i = 0; i < tensor->rank; i++) {
        if (values > ((uint64_t)1 << 57) / tensor->dims[i]) return GRAPH_TOO_LARGE;
        values *= tensor->dims[i];
    }
    return (values * graph_bits(tensor->kind) + 7) / 8;
}

static bool graph_digits(graph_span text, uint64_t *out) {
    *out = 0;
    if (text.at == text.end || span_size(text) > GRAPH_DIGITS) return false;
    for (; text.at < text.end; text.at++) {
        if (*text.at < '0' || *text.at > '9') return false;
        *out = *out * 10 + (uint64_t)(*text.at - '0');
    }
    return true;
}

/* Reads one of the entries that say where the weights are. */
static bool graph_entry(graph *self, graph_tensor *tensor, const graph_field *field) {
    static const char *const keys[] = {"location", "offset", "length"};
    graph_message message;
    graph_field part;
    graph_span key = GRAPH_EMPTY, value = key;
    if (!graph_enter(self, field, "place", FIELD(1) | FIELD(2), 0, &message)) return false;
    while (graph_next(self, &message, &part)) {
        graph_text(self, &part, part.number == 1 ? &key : &value);
    }
    for (unsigned i = 0; !self->wrong && i < 3; i++) {
        if (!span_is(key, keys[i]) || tensor->entries & 1u << i) continue;
        tensor->entries |= 1u << i;
        if (i == 0 && !span_is(value, DATA_FILE)) {
            return graph_wrong(self, "reads weights from '%.*s': not " DATA_FILE, SHOWN(value));
        }
        if (i && !graph_digits(value, i == 1 ? &tensor->offset : &tensor->length)) {
            return graph_wrong(self, "has weights whose place in " DATA_FILE " is not a number");
        }
        return true;
    }
    return graph_wrong(self, "has weights without a plain place in " DATA_FILE);
}

/* Checks the place of weights: in the data file, which all of them may fill twice, as a head that is
 * tied to the embedding is there once and named twice. */
static bool graph_weights(graph *self, const graph_tensor *tensor, uint64_t size) {
    if (tensor->entries != 7) {
        return graph_wrong(self, "has the weights '%.*s' without a plain place in " DATA_FILE,
                           SHOWN(tensor->name));
    }
    if (tensor->length != size) {
        return graph_wrong(self, "has the weights '%.*s', whose shape does not fit their bytes",
                           SHOWN(tensor->name));
    }
    if (tensor->offset > self->data_size || size > self->data_size - tensor->offset) {
        return graph_wrong(self, "has the weights '%.*s' after the end of " DATA_FILE,
                           SHOWN(tensor->name));
    }
    self->data_used += size;
    if (self->data_used / 2 + self->data_used % 2 > self->data_size) {
        return graph_wrong(self, "has weights that name the same bytes of " DATA_FILE
                                 " again and again");
    }
    return true;
}

/* What a tensor of integers in the graph is. */
static graph_what graph_integers(graph_span raw) {
    for (; raw.at < raw.end; raw.at += 8) {
        uint64_t value = 0;
        for (unsigned i = 0; i < 8; i++) value |= (uint64_t)raw.at[i] << (8 * i);
        if (value > 1 && value != UINT64_MAX) return GRAPH_LARGE;
    }
    return GRAPH_SMALL;
}

static bool graph_initializer(graph *self, const graph_field *field) {
    graph_message message;
    graph_field part;
    graph_tensor tensor = {.name = GRAPH_EMPTY, .raw = GRAPH_EMPTY};
    bool raw_sound = true, places = false;
    uint32_t once = FIELD(2) | FIELD(8) | FIELD(9) | FIELD(12) | FIELD(14);
    uint32_t many = FIELD(1) | FIELD(13) | FIELD(16);
    if (!graph_enter(self, field, "tensor", once, many, &message)) return false;
    while (graph_next(self, &message, &part)) {
        switch (part.number) {
        case 1: graph_dimensions(self, &tensor, &part); break;
        case 2: graph_number(self, &part, &tensor.kind); break;
        case 8: graph_text(self, &part, &tensor.name); break;
        case 9:
            raw_sound = part.is_bytes;
            if (raw_sound) tensor.raw = part.bytes;
            break;
        case 13: places = graph_entry(self, &tensor, &part); break;
        case 14: graph_number(self, &part, &tensor.place); break;
        default: break;
        }
    }
    if (self->wrong) return false;
    if (!graph_bits(tensor.kind)) {
        return graph_wrong(self, "has the weights '%.*s' of a type that no export writes",
                           SHOWN(tensor.name));
    }
    graph_name *added = graph_add(self, &self->tensors, tensor.name);
    if (added) {
        added->kind = (unsigned)tensor.kind;
        added->rank = (int)tensor.rank;
        for (size_t i = 0; i < tensor.rank && i < 4; i++) added->of.dims[i] = (int64_t)tensor.dims[i];
    }
    uint64_t size = graph_size(&tensor);
    if (!added || tensor.place == 1) return added && graph_weights(self, &tensor, size);
    if (places || !raw_sound || span_size(tensor.raw) != size) {
        return graph_wrong(self, "has the constant '%.*s', whose shape does not fit its bytes",
                           SHOWN(tensor.name));
    }
    if (graph_bits(tensor.kind) == 64) added->what = graph_integers(tensor.raw);
    return true;
}

/* ---- inputs and outputs ----------------------------------------------------------------------- */

/* Reads one length of a shape; -1 is one that varies. */
static bool graph_length(graph *self, const graph_field *field, int64_t *out) {
    graph_message message;
    graph_field part;
    graph_span name;
    uint64_t value = 0;
    uint32_t both = FIELD(1) | FIELD(2);
    if (!graph_enter(self, field, "length", both | FIELD(3), 0, &message)) return false;
    while (graph_next(self, &message, &part)) {
        if (part.number == 1) graph_number(self, &part, &value);
        if (part.number == 2) graph_text(self, &part, &name);
    }
    if (self->wrong) return false;
    if (!(message.seen & both) || (message.seen & both) == both) {
        return graph_wrong(self, "has a length that is neither a number nor a name");
    }
    if (value > INT64_MAX) return graph_wrong(self, "has an input or output of a negative length");
    *out = message.seen & FIELD(2) ? -1 : (int64_t)value;
    return true;
}

static bool graph_shape(graph *self, const graph_field *field, graph_name *value) {
    graph_message message;
    graph_field part;
    int64_t length = 0;
    uint64_t values = 1;
    bool empty = false;
    if (!graph_enter(self, field, "shape", 0, FIELD(1), &message)) return false;
    while (graph_next(self, &message, &part)) {
        if (!graph_length(self, &part, &length)) return false;
        if (value->rank < 4) value->of.dims[value->rank] = length;
        value->rank++;
        if (length == 0) empty = true;
        if (length < 1) continue;
        values = (uint64_t)length > GRAPH_INPUT || values > GRAPH_INPUT ? GRAPH_INPUT + 1
                                                                        : values * (uint64_t)length;
    }
    if (!empty && values > GRAPH_INPUT) {
        graph_wrong(self, "has the input or output '%.*s', which is too large", SHOWN(value->name));
    }
    return !self->wrong;
}

/* A type has a tensor's type, which has a shape; other types are refused. */
static bool graph_type(graph *self, const graph_field *field, graph_name *value) {
    graph_message type, tensor;
    graph_field part, inner;
    if (!graph_enter(self, field, "type", FIELD(1) | FIELD(6), 0, &type)) return false;
    while (graph_next(self, &type, &part)) {
        if (part.number != 1) continue;
        if (!graph_enter(self, &part, "tensor's type", FIELD(1) | FIELD(2), 0, &tensor)) {
            return false;
        }
        while (graph_next(self, &tensor, &inner)) {
            if (inner.number == 2 && !graph_shape(self, &inner, value)) return false;
        }
    }
    return !self->wrong;
}

static bool graph_input(graph *self, const graph_field *field, graph_names *list) {
    graph_message message;
    graph_field part;
    graph_name *value = graph_add(self, list, (graph_span)GRAPH_EMPTY);
    uint32_t once = FIELD(1) | FIELD(2) | FIELD(3);
    if (!value || !graph_enter(self, field, "value", once, FIELD(4), &message)) return false;
    while (graph_next(self, &message, &part)) {
        if (part.number == 1) graph_text(self, &part, &value->name);
        if (part.number == 2) graph_type(self, &part, value);
    }
    return !self->wrong;
}

/* Whether `name` is `start`, a number below `layers`, and ".key" or ".value". */
static bool graph_is_cache(graph_span name, const char *start, size_t layers) {
    size_t layer = 0, digits = 0;
    if (!span_starts(name, start)) return false;
    name.at += strlen(start);
    for (; name.at < name.end && *name.at >= '0' && *name.at <= '9'; name.at++, digits++) {
        if (digits && !layer) return false; /* a zero before it */
        layer = layer * 10 + (size_t)(*name.at - '0');
        if (layer >= layers) return false;
    }
    return digits && (span_is(name, ".key") || span_is(name, ".value"));
}

/* Whether `name` is model.MODULE.lora_A.weight, or lora_B. */
static bool graph_is_adapter(graph_span name) {
    static const char *const ends[] = {".lora_A.weight", ".lora_B.weight"};
    const size_t end = strlen(ends[0]), start = strlen("model.");
    if (!span_starts(name, "model.") || span_size(name) <= start + end) return false;
    for (const uint8_t *c = name.at; c < name.end - end; c++) {
        bool letter = (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z');
        if (!letter && !(*c >= '0' && *c <= '9') && *c != '_' && *c != '.') return false;
    }
    graph_span rest = {name.end - end, name.end};
    return span_is(rest, ends[0]) || span_is(rest, ends[1]);
}

static const graph_name *graph_named(const graph_names *list, const char *name) {
    const uint8_t *at = (const uint8_t *)name;
    return graph_find(list, (graph_span){at, at + strlen(name)});
}

/* Whether the inputs of the cache all have one shape: [batch, heads, positions, size]. */
static bool graph_cache(graph *self, size_t layers) {
    for (size_t i = 0; i < self->inputs.count; i++) {
        const graph_name *value = &self->inputs.all[i];
        if (!graph_is_cache(value->name, "past_key_values.", layers)) continue;
        const int64_t *dims = value->of.dims;
        if (value->rank != 4 || dims[1] < 1 || dims[3] < 1) return false;
        if (self->heads && (dims[1] != self->heads || dims[3] != self->head_size)) return false;
        self->heads = dims[1];
        self->head_size = dims[3];
    }
    return true;
}

/* Checks that inputs and outputs are those of a Llama. */
static bool graph_interface(graph *self) {
    if (!graph_unique(self, &self->inputs, "input")) return false;
    if (!graph_unique(self, &self->outputs, "output")) return false;
    size_t other = 0, layers;
    for (size_t i = 0; i < self->inputs.count; i++) {
        other += graph_is_adapter(self->inputs.all[i].name);
    }
    const graph_name *logits = graph_named(&self->outputs, "logits");
    if (!graph_named(&self->inputs, "input_ids") || !graph_named(&self->inputs, "attention_mask")) {
        return graph_wrong(self, "has no input_ids or no attention_mask");
    }
    layers = (self->inputs.count - other - 2) / 2;
    bool sound = layers && logits && self->inputs.count == 2 * layers + other + 2 &&
                 self->outputs.count == 2 * layers + 1;
    for (size_t i = 0; sound && i < self->inputs.count; i++) {
        graph_span name = self->inputs.all[i].name;
        sound = graph_is_cache(name, "past_key_values.", layers) || graph_is_adapter(name) ||
                span_is(name, "input_ids") || span_is(name, "attention_mask");
    }
    for (size_t i = 0; sound && i < self->outputs.count; i++) {
        const graph_name *value = &self->outputs.all[i];
        sound = value == logits || graph_is_cache(value->name, "present.", layers);
    }
    if (!sound) return graph_wrong(self, "has other inputs or outputs than a Llama");
    if (!graph_cache(self, layers) || logits->rank != 3 || logits->of.dims[2] < 1) {
        return graph_wrong(self, "has a cache or logits of another shape than a Llama");
    }
    self->layers = (int64_t)layers;
    self->vocab_size = logits->of.dims[2];
    return true;
}

/* ---- the whole file --------------------------------------------------------------------------- */

static bool graph_operator_set(graph *self, const graph_field *field) {
    graph_message message;
    graph_field part;
    graph_span domain = GRAPH_EMPTY;
    if (!graph_enter(self, field, "operator set", FIELD(1) | FIELD(2), 0, &message)) return false;
    while (graph_next(self, &message, &part)) {
        if (part.number == 1) graph_text(self, &part, &domain);
    }
    if (!self->wrong && !span_is(domain, "") && !span_is(domain, MICROSOFT)) {
        graph_wrong(self, "uses the operator set '%.*s', which no export writes", SHOWN(domain));
    }
    return !self->wrong;
}

static bool graph_parts(graph *self, const graph_field *field) {
    graph_message message;
    graph_field part;
    uint32_t many = FIELD(1) | FIELD(5) | FIELD(11) | FIELD(12) | FIELD(13) | FIELD(16);
    if (!graph_enter(self, field, "graph", FIELD(2) | FIELD(10), many, &message)) return false;
    while (graph_next(self, &message, &part)) {
        switch (part.number) {
        case 1: graph_node(self, &part); break;
        case 5: graph_initializer(self, &part); break;
        case 11: graph_input(self, &part, &self->inputs); break;
        case 12: graph_input(self, &part, &self->outputs); break;
        default: break;
        }
    }
    return !self->wrong;
}

static bool graph_model(graph *self, const char *bytes, size_t length) {
    const uint8_t *start = (const uint8_t *)bytes;
    /* Without 14, metadata_props: there ONNX Runtime looks for settings ("ort_config"). */
    uint32_t once = 0xfe;
    graph_message message = {{start, start + length}, "model", once, FIELD(8), 0, false};
    graph_field part;
    if (length >= 8 && memcmp(bytes + 4, "ORTM", 4) == 0) {
        return graph_wrong(self, "is in ONNX Runtime's own format, which is not checked");
    }
    while (graph_next(self, &message, &part)) {
        if (part.number == 7) graph_parts(self, &part);
        if (part.number == 8) graph_operator_set(self, &part);
    }
    if (!self->wrong && !(message.seen & FIELD(7))) {
        graph_wrong(self, "is not an ONNX model (there is no graph in it)");
    }
    return !self->wrong && graph_unique(self, &self->tensors, "weights") && graph_ranges(self) && graph_joins(self) &&
           graph_constants(self) && graph_interface(self);
}

/* Checks the bytes of model.onnx, whose weights are in a file of `data_size` bytes. On success `out`
 * has the sizes of the model; on failure `why` says what is wrong, to follow the file's name. */
static bool graph_read(const char *bytes, size_t length, uint64_t data_size, config *out,
                       char why[WHY]) {
    graph self = {.fields_left = GRAPH_FIELDS, .data_size = data_size, .why = why};
    bool sound = graph_model(&self, bytes, length);
    free(self.tensors.all);
    free(self.made.all);
    free(self.ranges.all);
    free(self.joined.all);
    free(self.reads.all);
    free(self.folds.all);
    free(self.inputs.all);
    free(self.outputs.all);
    if (sound && (self.heads > ANY_INT || self.head_size > ANY_INT || self.vocab_size > ANY_INT)) {
        explain(why, "has a cache or logits that are too large");
        sound = false;
    }
    if (sound) {
        *out = (config){.vocab_size = (int)self.vocab_size, .layers = (int)self.layers,
                        .heads = (int)self.heads, .head_size = (int)self.head_size};
    }
    return sound;
}

/* Whether the sizes that onnxruntime-genai allocates by are those of the graph. */
static bool config_fits(const config *given, const config *graph, char why[WHY]) {
    const struct {
        const char *key;
        int given, right;
    } sizes[] = {
        {"num_hidden_layers", given->layers, graph->layers},
        {"num_key_value_heads", given->heads, graph->heads},
        {"head_size", given->head_size, graph->head_size},
        {"vocab_size", given->vocab_size, graph->vocab_size},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (sizes[i].given == sizes[i].right) continue;
        explain(why, "has %d as %s, but the graph has %d", sizes[i].given, sizes[i].key,
                sizes[i].right);
        return false;
    }
    return true;
}

/* Checks the model.onnx of a package with the settings `given`. Returns false and a sentence if it
 * is not what exports write. */
static bool check_graph(const char *package, const config *given, char why[SENTENCE]) {
    char reason[WHY];
    const char *file = MODEL_FILE;
    size_t length;
    uint64_t data_size = 0;
    config found;
    bool sound = false;
    char *bytes = read_file(package, MODEL_FILE, GRAPH_BYTES, &length);
    if (!bytes) {
        explain(reason, "%s", length == SIZE_MAX ? "is too large" : "cannot be read");
    } else if (!size_of_file(package, DATA_FILE, &data_size)) {
        file = DATA_FILE;
        explain(reason, "cannot be read");
    } else if (graph_read(bytes, length, data_size, &found, reason)) {
        file = "genai_config.json";
        sound = config_fits(given, &found, reason);
    }
    free(bytes);
    if (!sound) say(why, "%.900s%s%s %s.", package, SEPARATOR, file, reason);
    return sound;
}

#endif
