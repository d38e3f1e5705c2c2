/* Whether a chat template is harmless: an upper bound of the work that it can make.
 *
 * onnxruntime-genai's engine cannot be interrupted, and a template can keep it busy for ever, fill
 * the memory or overflow the stack, which ends the process. So a template is checked before the
 * engine gets it, against the conversation that it is to format: every branch is followed, every
 * loop counts as often as its list can be long, and the sizes of texts are added up.
 *
 * Refused are templates that need more than a bounded number of steps, texts that grow faster than
 * by adding to them, macros that call themselves, and whatever this file does not know: other
 * tags, functions, methods and filters than those below, products, and tags longer than any
 * template needs.
 */
#ifndef LLAMA_ONNX_TEMPLATE_H
#define LLAMA_ONNX_TEMPLATE_H

#include "json.h"

enum {
    TEMPLATE_BYTES = 1 << 16,
    TOKENS_IN_TAG = 300,
    BRACKETS_DEEP = 16,
    BLOCKS_DEEP = 24,
    WALKS_DEEP = 48, /* blocks inside one another, those of macros that call macros included */
    VARIABLES = 96,
    MACROS = 32,
    WALKS = 40000,      /* tags that the check itself visits */
    LONGEST_RUN = 2000, /* of spaces, and the longest comment: the engine recurses for each character
                         * and overflows the stack after some 20,000 */
    LARGEST_NUMBER = 10000,
    LISTS_DEEP = 64
};

/* Tokens times bytes: the engine takes about 0.1 microseconds for each, three seconds in all. The
 * longest of 150 templates in use has half as much. */
#define MOST_PARSING 3e7

/* Bytes copied; a visit of a tag counts as many as it takes the time for. */
#define MOST_WORK 2e9
#define WORK_OF_TAG 200

/* What a conversation adds to the work of a template. */
typedef struct weights {
    double messages, bytes, longest, extra; /* `extra`: the largest message's entries besides role
                                             * and content */
} weights;

/* A TEXT is a message's content or role, whose elements are its characters. */
typedef enum { ABSENT, MESSAGES, MESSAGE, TEXT, OTHER } value_kind;

/* The upper bounds of a value: bytes as text; elements or characters, or a number's size; and how
 * deeply it nests lists. */
typedef struct value {
    value_kind kind;
    double size, count, depth;
} value;

static value bounds(value_kind kind, double size, double count) {
    return (value){kind, size, count, 0};
}

static const value nothing = {ABSENT, 0, 0, 0};

typedef struct token {
    char kind; /* 'n' a name, 's' a string, '0' a number, otherwise the character itself */
    const char *text;
    int length;
} token;

typedef struct tag {
    size_t first, end; /* its tokens; the first one is the name of a statement */
    bool output;
    int text;     /* bytes of text before it */
    size_t match; /* the tag that closes it */
} tag;

typedef struct variable {
    token name, attribute; /* `attribute` of a namespace, with length 0 otherwise */
    bool is_namespace;
    value value;
} variable;

typedef struct macro {
    token name;
    size_t tag;
    bool active;
} macro;

typedef struct analysis {
    token *tokens;
    tag *tags;
    size_t token_count, tag_count, walks, depth;
    variable variables[VARIABLES];
    size_t variable_count;
    macro macros[MACROS];
    size_t macro_count;
    int conditional; /* above 0: what is walked may not happen */
    double work;
    weights weights;
    char *why; /* what is wrong, to follow "the model's chat template"; "" while nothing is */
} analysis;

static void refuse(analysis *self, const char *format, ...) {
    va_list arguments;
    if (*self->why) return;
    va_start(arguments, format);
    vsnprintf(self->why, WHY, format, arguments);
    va_end(arguments);
}

static bool is(const token *t, const char *text) {
    return t->kind == 'n' && strlen(text) == (size_t)t->length &&
           memcmp(t->text, text, (size_t)t->length) == 0;
}

static bool same(const token *a, const token *b) {
    return a->length == b->length && memcmp(a->text, b->text, (size_t)a->length) == 0;
}

/* `names` are separated by spaces. */
static bool is_one_of(const token *t, const char *names) {
    for (const char *name = names; *name; name += strspn(name, " ")) {
        size_t length = strcspn(name, " ");
        if (length == (size_t)t->length && memcmp(t->text, name, length) == 0) return true;
        name += length;
    }
    return false;
}

/* ---- tokens ----------------------------------------------------------------------------------- */

static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* Reads the token at `*at`; moves `*at` behind it. */
static bool read_token(analysis *self, const char **at, const char *end, token *out) {
    const char *c = *at;
    *out = (token){*c, c, 1};
    if (is_letter(*c)) {
        while (c < end && (is_letter(*c) || is_digit(*c))) c++;
        out->kind = 'n';
    } else if (is_digit(*c)) {
        while (c < end && (is_digit(*c) || *c == '.')) c++;
        out->kind = '0';
    } else if (*c == '"' || *c == '\'') {
        for (c++; c < end && *c != *out->text; c++) c += *c == '\\' && c + 1 < end;
        out->kind = 's';
        c++;
        if (c > end) refuse(self, "has a text without an end");
    } else if (strchr("()[]{}.,:|=!<>+-/%~", *c)) {
        c++;
    } else {
        refuse(self, *c == '*' ? "multiplies" : "has a character that no tag may have");
    }
    out->length = (int)(c - *at);
    *at = c;
    return !*self->why;
}

/* The end of a tag, "}}" or "%}" at `c`, with a sign before it or not; 0 if it does not end here. */
static size_t tag_end(const char *c, const char *end, char mark) {
    size_t sign = c < end && (*c == '-' || *c == '+');
    bool found = end - c >= 2 + (long)sign && c[sign] == mark && c[sign + 1] == '}';
    return found ? 2 + sign : 0;
}

/* Reads the tokens of a tag, whose inside starts at `c`; returns its end. */
static const char *read_tag(analysis *self, const char *c, const char *end, char mark, tag *out) {
    int depth = 0;
    out->first = self->token_count;
    if (c < end && (*c == '-' || *c == '+' || *c == '~')) c++;
    while (!*self->why) {
        while (c < end && strchr(" \t\r\n", *c)) c++;
        if (c >= end) {
            refuse(self, "has a tag without an end");
            break;
        }
        size_t close = depth ? 0 : tag_end(c, end, mark);
        if (close) {
            c += close;
            break;
        }
        if (!read_token(self, &c, end, &self->tokens[self->token_count])) break;
        char kind = self->tokens[self->token_count++].kind;
        depth += strchr("([{", kind) != NULL;
        depth -= strchr(")]}", kind) != NULL;
        if (depth < 0) refuse(self, "has a bracket that is not open");
        if (depth > BRACKETS_DEEP) refuse(self, "nests brackets too deeply");
        if (self->token_count - out->first > TOKENS_IN_TAG) refuse(self, "has a tag that is too long");
    }
    out->end = self->token_count;
    return c;
}

static void check_spaces(analysis *self, const char *text) {
    for (size_t size; *text; text += size ? size : 1) {
        size = strspn(text, " \t\r\n");
        if (size > LONGEST_RUN) refuse(self, "has too many spaces in a row");
    }
}

static void read_tags(analysis *self, const char *text, const char *end) {
    const char *before = text;
    for (const char *c = text; c + 1 < end && !*self->why;) {
        if (c[0] != '{' || !strchr("{%#", c[1])) {
            c++;
            continue;
        }
        tag *next = &self->tags[self->tag_count];
        *next = (tag){.output = c[1] == '{', .text = (int)(c - before)};
        if (c[1] == '#') {
            const char *close = c + 2;
            while (close + 1 < end && (close[0] != '#' || close[1] != '}')) close++;
            if (close + 1 >= end) refuse(self, "has a comment without an end");
            if (close - c > LONGEST_RUN) refuse(self, "has a comment that is too long");
            c = close + 2;
            continue;
        }
        c = read_tag(self, c + 2, end, c[1] == '{' ? '}' : '%', next);
        bool empty = next->first == next->end;
        if (empty || (!next->output && self->tokens[next->first].kind != 'n')) {
            refuse(self, "has a tag without content");
        }
        self->tag_count++;
        before = c;
    }
    self->tags[self->tag_count] = (tag){.text = (int)(end - before)};
}

static const token *statement(const analysis *self, size_t index) {
    return &self->tokens[self->tags[index].first];
}

/* The "=" of {% set a = b %}, or the end of the tag for {% set a %}...{% endset %}. */
static size_t equals_sign(const analysis *self, const tag *one) {
    for (size_t i = one->first; i < one->end; i++) {
        if (self->tokens[i].kind == '=') return i;
    }
    return one->end;
}

/* Finds the end of each block. */
static void match_tags(analysis *self) {
    static const char opens[] = "if for macro set generation";
    static const char closes[] = "endif endfor endmacro endset endgeneration";
    static const char others[] = "elif else break continue";
    size_t stack[BLOCKS_DEEP], depth = 0;
    for (size_t i = 0; i < self->tag_count && !*self->why; i++) {
        tag *one = &self->tags[i];
        const token *name = statement(self, i);
        if (one->output || is_one_of(name, others)) continue;
        if (is_one_of(name, opens)) {
            one->match = i;
            if (is(name, "set") && equals_sign(self, one) < one->end) continue;
            if (depth == BLOCKS_DEEP) refuse(self, "nests blocks too deeply");
            if (depth < BLOCKS_DEEP) stack[depth++] = i;
        } else if (is_one_of(name, closes)) {
            token inner = {'n', name->text + 3, name->length - 3};
            if (!depth || !same(&inner, statement(self, stack[depth - 1]))) {
                refuse(self, "closes a block that is not open");
            } else {
                self->tags[stack[--depth]].match = i;
            }
        } else {
            refuse(self, "uses the tag '%.*s'", name->length > 40 ? 40 : name->length, name->text);
        }
    }
    if (depth) refuse(self, "has a block that is not closed");
}

/* ---- variables -------------------------------------------------------------------------------- */

static const token no_attribute = {'n', "", 0};

static variable *find_variable(analysis *self, const token *name, const token *attribute) {
    for (size_t i = 0; i < self->variable_count; i++) {
        variable *one = &self->variables[i];
        if (same(&one->name, name) && same(&one->attribute, attribute)) return one;
    }
    return NULL;
}

static macro *find_macro(analysis *self, const token *name) {
    for (size_t i = 0; i < self->macro_count; i++) {
        if (same(&self->macros[i].name, name)) return &self->macros[i];
    }
    return NULL;
}

static double larger(double a, double b) { return a > b ? a : b; }

/* Either of two values. */
static value either(value a, value b) {
    value_kind kind = a.kind == b.kind || b.kind == ABSENT ? a.kind : a.kind == ABSENT ? b.kind : OTHER;
    return (value){kind, larger(a.size, b.size), larger(a.count, b.count), larger(a.depth, b.depth)};
}

static void assign(analysis *self, const token *name, const token *attribute, value given) {
    variable *known = find_variable(self, name, attribute);
    bool taken = !attribute->length && known && known->is_namespace;
    if (taken || find_macro(self, name)) {
        refuse(self, "uses the name '%.*s' twice", name->length > 40 ? 40 : name->length, name->text);
    } else if (known) {
        known->value = self->conditional ? either(known->value, given) : given;
    } else if (self->variable_count == VARIABLES) {
        refuse(self, "has too many variables");
    } else {
        self->variables[self->variable_count++] = (variable){*name, *attribute, false, given};
    }
}

/* ---- expressions ------------------------------------------------------------------------------ */

static double walk(analysis *self, size_t from, size_t to, double times);
static value expression(analysis *self, size_t i, size_t end, double times);

static const char keeping_filters[] = "list reverse sort unique select reject selectattr rejectattr "
                                      "safe default d";
/* Not int and float: they make numbers of any size out of texts. */
static const char text_filters[] = "trim upper lower title capitalize string items dictsort abs bool";
/* What select, reject and their like may ask; any other name is that of a macro. */
static const char tests[] = "equalto eq ne in defined undefined none string number mapping iterable "
                            "sequence true false boolean integer odd even";
static const char text_methods[] = "strip lstrip rstrip split splitlines startswith endswith upper "
                                   "lower title capitalize items keys values cycle";

/* The token that closes the bracket at `i`. */
static size_t closing(const analysis *self, size_t i, size_t end) {
    int depth = 0;
    for (; i < end; i++) {
        depth += strchr("([{", self->tokens[i].kind) != NULL;
        depth -= strchr(")]}", self->tokens[i].kind) != NULL;
        if (!depth) return i;
    }
    return end;
}

static double commas(const analysis *self, size_t i, size_t end) {
    double count = 0;
    for (; i < end; i++) count += self->tokens[i].kind == ',';
    return count;
}

static value text_of(double size) { return bounds(OTHER, size, size); }

/* The entry `name` of a value. */
static value entry(const analysis *self, value from, const char *name, int length) {
    if (from.kind != MESSAGE) return from;
    bool known = (length == 4 && !memcmp(name, "role", 4)) ||
                 (length == 7 && !memcmp(name, "content", 7));
    if (known) return bounds(TEXT, from.size, from.size);
    return self->weights.extra > 0 ? text_of(self->weights.extra) : nothing;
}

static value subscript(analysis *self, value from, size_t i, size_t end, double times) {
    bool slice = false;
    for (size_t k = i; k < end; k++) slice = slice || self->tokens[k].kind == ':';
    expression(self, i, end, times);
    if (slice || (from.kind != MESSAGES && from.kind != MESSAGE)) return from;
    if (from.kind == MESSAGES) return bounds(MESSAGE, self->weights.longest, 2);
    const token *key = &self->tokens[i];
    if (end == i + 1 && key->kind == 's') return entry(self, from, key->text + 1, key->length - 2);
    return text_of(from.size + self->weights.extra);
}

static value apply_filter(analysis *self, const token *name, value v, value given) {
    if (is_one_of(name, keeping_filters)) return is_one_of(name, "default d") ? either(v, given) : v;
    if (is_one_of(name, "length count")) return bounds(OTHER, 20, v.count);
    if (is_one_of(name, "first last")) {
        return v.kind == MESSAGES ? bounds(MESSAGE, self->weights.longest, 2) : v;
    }
    if (is_one_of(name, text_filters)) return (value){OTHER, v.size + 20, v.count, v.depth};
    if (is_one_of(name, "tojson indent")) {
        return text_of((v.size + v.count) * (8 + given.size + given.count));
    }
    if (is_one_of(name, "e escape")) return text_of(v.size * 6);
    if (is_one_of(name, "join")) return text_of(v.size + v.count * given.size);
    if (is_one_of(name, "replace map")) {
        return (value){OTHER, (v.size + 1) * (1 + given.size), v.count, v.depth};
    }
    refuse(self, "uses the filter '%.*s'", name->length > 40 ? 40 : name->length, name->text);
    return v;
}

/* Refuses what a filter calls by a name in its arguments, from `i` to `end`: map('m') calls m. */
static void check_named(analysis *self, const token *filter, size_t i, size_t end) {
    bool by_attribute = is_one_of(filter, "selectattr rejectattr");
    if (is(filter, "map")) {
        bool attribute = i + 1 < end && is(&self->tokens[i], "attribute") &&
                         self->tokens[i + 1].kind == '=';
        if (!attribute) refuse(self, "uses map() without attribute=");
        return;
    }
    if (!by_attribute && !is_one_of(filter, "select reject")) return;
    if (by_attribute) { /* the test is the second argument */
        while (i < end && self->tokens[i].kind != ',') i++;
        i++;
    }
    if (i >= end) return;
    const token *test = &self->tokens[i];
    const token name = {'n', test->text + 1, test->length - 2};
    bool literal = test->kind == 's' && (i + 1 == end || self->tokens[i + 1].kind == ',');
    if (!literal || !is_one_of(&name, tests)) refuse(self, "uses %.*s() with an unknown test",
                                                     filter->length, filter->text);
}

static value call_method(analysis *self, const token *name, value v, size_t i, size_t end,
                         double times) {
    value given = expression(self, i, end, times);
    const token *key = &self->tokens[i];
    if (is(name, "get")) {
        bool constant = i < end && key->kind == 's';
        value found = constant ? entry(self, v, key->text + 1, key->length - 2)
                    : v.kind == MESSAGE ? text_of(v.size + self->weights.extra) : v;
        return either(found, given);
    }
    if (is_one_of(name, "split replace") && (i == end || key->kind != 's' || key->length < 3)) {
        /* onnxruntime-genai 0.18 never ends to split at an empty text. */
        refuse(self, "calls %.*s() with something else than a text that is not empty", name->length,
               name->text);
    }
    if (is(name, "replace")) return text_of((v.size + 1) * (1 + given.size));
    if (is(name, "join")) return text_of(given.size + given.count * v.size);
    if (is(name, "cycle")) return given;
    if (is_one_of(name, text_methods)) {
        return v.kind == ABSENT ? v : (value){OTHER, v.size + 20, v.size + 1, v.depth};
    }
    refuse(self, "calls the method '%.*s'", name->length > 40 ? 40 : name->length, name->text);
    return v;
}

/* Whether there is one number at `i`, whole and not 0, and nothing else before `end`. */
static bool is_whole(const analysis *self, size_t i, size_t end) {
    if (i + 1 != end) return false;
    const token *t = &self->tokens[i];
    return t->kind == '0' && !memchr(t->text, '.', (size_t)t->length) &&
           strspn(t->text, "0") < (size_t)t->length;
}

/* range(): its arguments may be numbers and lengths, because other numbers can have any size. */
static value call_range(analysis *self, size_t i, size_t end, double times) {
    int names = 0, lengths = 0;
    for (size_t k = i; k < end; k++) {
        const token *t = &self->tokens[k];
        char before = k > i ? self->tokens[k - 1].kind : ',';
        if (t->kind == '|') lengths += k + 1 < end && is_one_of(t + 1, "length count");
        if (t->kind == '|' && !(k + 1 < end && is_one_of(t + 1, "length count"))) names = 99;
        if (t->kind == 'n' && before != '.' && before != '|') names++;
        if (t->kind == '(' || t->kind == '/') names = 99;
    }
    if (names != lengths) refuse(self, "calls range() with something else than numbers and lengths");
    if (commas(self, i, end) >= 2) {
        size_t step = end;
        while (step > i && self->tokens[step - 1].kind != ',') step--;
        step += step < end && self->tokens[step].kind == '-';
        if (!is_whole(self, step, end)) refuse(self, "calls range() with a step that may be 0");
    }
    value given = expression(self, i, end, times);
    return bounds(OTHER, 20 * given.count, given.count);
}

static value call_macro(analysis *self, macro *called, size_t i, size_t end, double times) {
    const tag *definition = &self->tags[called->tag];
    value given = expression(self, i, end, times);
    if (called->active) {
        refuse(self, "has the macro '%.*s', which calls itself",
               called->name.length > 40 ? 40 : called->name.length, called->name.text);
        return given;
    }
    called->active = true;
    self->conditional++;
    for (size_t k = definition->first + 3; k < definition->end; k++) {
        /* parameters, and default values, whose names are taken for parameters without harm */
        bool parameter = self->tokens[k].kind == 'n' && !is_one_of(&self->tokens[k], "true false none");
        if (!strchr("ns0=,)[]{}", self->tokens[k].kind)) {
            refuse(self, "has a macro with a default value that is more than a value");
        }
        if (parameter) assign(self, &self->tokens[k], &no_attribute, given);
    }
    double size = walk(self, called->tag + 1, definition->match, times);
    self->conditional--;
    called->active = false;
    return text_of(size);
}

/* A name and the brackets of a call after it; `*i` is the name and moves behind the call. */
static value call_value(analysis *self, size_t *i, size_t end, double times) {
    const token *name = &self->tokens[*i];
    size_t open = *i + 1, close = closing(self, open, end);
    macro *called = find_macro(self, name);
    *i = close + 1;
    if (called) return call_macro(self, called, open + 1, close, times);
    if (is(name, "range")) return call_range(self, open + 1, close, times);
    value given = expression(self, open + 1, close, times);
    if (is_one_of(name, "raise_exception dict")) return text_of(given.size);
    if (is(name, "strftime_now")) return text_of(64 * (1 + given.size));
    refuse(self, "calls the function '%.*s'", name->length > 40 ? 40 : name->length, name->text);
    return given;
}

/* A variable, or the attribute of a namespace; `*i` is the name and moves behind it. */
static value read_variable(analysis *self, size_t *i, size_t end) {
    const token *name = &self->tokens[*i];
    bool dotted = *i + 2 < end && name[1].kind == '.' && name[2].kind == 'n';
    const variable *known = find_variable(self, name, &no_attribute);
    int shown = name->length > 40 ? 40 : name->length;
    *i += 1;
    if (find_macro(self, name)) {
        refuse(self, "uses the macro '%.*s' without calling it", shown, name->text);
    }
    if (!known || !known->is_namespace) return known ? known->value : nothing;
    if (!dotted) {
        refuse(self, "uses the namespace '%.*s' without an attribute", shown, name->text);
        return known->value;
    }
    *i += 2;
    known = find_variable(self, name, name + 2);
    return known ? known->value : nothing;
}

static value read_number(analysis *self, const token *t) {
    double number = t->length > 12 ? 1e12 : strtod(t->text, NULL);
    if (number > LARGEST_NUMBER) refuse(self, "has a number above %d", LARGEST_NUMBER);
    return bounds(OTHER, 20, number);
}

/* Something in brackets; `*i` is the opening one and moves behind the closing one. */
static value read_brackets(analysis *self, size_t *i, size_t end, double times) {
    size_t open = *i, close = closing(self, open, end);
    value inside = expression(self, open + 1, close, times);
    *i = close + 1;
    if (self->tokens[open].kind == '(' && !commas(self, open, close)) return inside;
    double count = commas(self, open, close) + 1;
    if (inside.depth >= LISTS_DEEP) refuse(self, "nests lists too deeply");
    return (value){OTHER, inside.size + 4 * count, count, inside.depth + 1};
}

/* Attributes, subscripts, calls of methods and filters after a value. */
static value read_rest(analysis *self, value v, size_t *i, size_t end, double times) {
    while (*i < end && !*self->why) {
        const token *t = &self->tokens[*i];
        bool named = *i + 1 < end && t[1].kind == 'n';
        bool called = *i + 2 < end && t[2].kind == '(';
        size_t close = called ? closing(self, *i + 2, end) : 0;
        if (t->kind == '(') {
            refuse(self, "calls something that is not a name");
        } else if (t->kind == '[') {
            close = closing(self, *i, end);
            v = subscript(self, v, *i + 1, close, times);
            *i = close + 1;
        } else if (t->kind == '.' && named && called) {
            v = call_method(self, t + 1, v, *i + 3, close, times);
            *i = close + 1;
        } else if (t->kind == '.' && named) {
            v = entry(self, v, t[1].text, t[1].length);
            *i += 2;
        } else if (t->kind == '|' && named) {
            value given = nothing;
            if (called) given = expression(self, *i + 3, close, times);
            check_named(self, t + 1, *i + 3, called ? close : *i + 3);
            v = apply_filter(self, t + 1, v, given);
            *i = called ? close + 1 : *i + 2;
        } else {
            break;
        }
    }
    return v;
}

/* Moves behind a word that is not a value: an operator, a test, the name of an argument. */
static bool skip_word(const analysis *self, size_t *i, size_t end) {
    const token *t = &self->tokens[*i];
    if (is(t, "is")) {
        *i += *i + 1 < end && is(t + 1, "not") ? 3 : 2;
        return true;
    }
    bool argument = *i + 1 < end && t[1].kind == '=' && !(*i + 2 < end && t[2].kind == '=');
    if (argument) {
        *i += 2;
        return true;
    }
    if (!is_one_of(t, "and or not in if else true false none True False None")) return false;
    *i += 1;
    return true;
}

static value read_value(analysis *self, size_t *i, size_t end, double times) {
    const token *t = &self->tokens[*i];
    if (strchr("([{", t->kind)) return read_brackets(self, i, end, times);
    if (t->kind == 'n') {
        bool called = *i + 1 < end && t[1].kind == '(';
        return called ? call_value(self, i, end, times) : read_variable(self, i, end);
    }
    *i += 1;
    return t->kind == '0' ? read_number(self, t) : text_of(t->length);
}

/* The value of an expression: the sum of all values in it, conditions left out. */
static value expression(analysis *self, size_t i, size_t end, double times) {
    value sum = nothing;
    bool condition = false, tuple = false;
    while (i < end && !*self->why) {
        const token *t = &self->tokens[i];
        if (is(t, "if") || is(t, "else")) condition = is(t, "if");
        bool more = i + 1 < end;
        if (strchr("%/", t->kind) && !(more && t[1].kind == '/')) {
            /* The engine ends the process where the smallest number is divided by -1. */
            bool sound = more && t[1].kind == '0' && strspn(t[1].text, "0.") < (size_t)t[1].length;
            if (!sound) refuse(self, "divides by something else than a number above 0");
        }
        if (t->kind == 'n' ? skip_word(self, &i, end) : !strchr("s0([{", t->kind)) {
            tuple = tuple || t->kind == ',';
            i += t->kind != 'n';
            continue;
        }
        value v = read_rest(self, read_value(self, &i, end, times), &i, end, times);
        self->work += times * (20 + v.size);
        if (condition) continue;
        sum.kind = sum.kind == ABSENT ? v.kind : v.kind == ABSENT || v.kind == sum.kind ? sum.kind
                                                                                        : OTHER;
        sum.size += v.size;
        sum.count += v.count;
        sum.depth = larger(sum.depth, v.depth);
    }
    if (tuple) sum.kind = OTHER;
    return sum;
}

/* ---- statements ------------------------------------------------------------------------------- */

/* {% set ns = namespace(a=1, b='') %} */
static void set_namespace(analysis *self, const token *name, size_t i, size_t end, double times) {
    assign(self, name, &no_attribute, nothing);
    for (size_t next; i < end && !*self->why; i = next + 1) {
        int depth = 0;
        for (next = i; next < end && (depth || self->tokens[next].kind != ','); next++) {
            depth += strchr("([{", self->tokens[next].kind) != NULL;
            depth -= strchr(")]}", self->tokens[next].kind) != NULL;
        }
        bool named = i + 2 < next && self->tokens[i].kind == 'n' && self->tokens[i + 1].kind == '=';
        if (!named) {
            refuse(self, "calls namespace() without names");
            break;
        }
        assign(self, name, &self->tokens[i], expression(self, i + 2, next, times));
    }
    variable *known = find_variable(self, name, &no_attribute);
    if (known) known->is_namespace = true;
}

/* Assigns `given` to what is between `i` and `end`: a, or a, b, or ns.a. */
static void set_targets(analysis *self, size_t i, size_t end, value given) {
    for (; i < end && !*self->why; i++) {
        const token *name = &self->tokens[i];
        bool dotted = i + 2 < end && name[1].kind == '.';
        if (name->kind == ',' || name->kind == '(' || name->kind == ')') continue;
        if (name->kind != 'n' || (dotted && name[2].kind != 'n')) {
            refuse(self, "assigns to something that is not a name");
        } else if (dotted) {
            const variable *known = find_variable(self, name, &no_attribute);
            if (!known || !known->is_namespace) {
                refuse(self, "sets an attribute of '%.*s', which is not a namespace",
                       name->length > 40 ? 40 : name->length, name->text);
            }
            assign(self, name, name + 2, given);
            i += 2;
        } else {
            assign(self, name, &no_attribute, given);
        }
    }
}

static void walk_set(analysis *self, size_t index, double times) {
    const tag *one = &self->tags[index];
    size_t sign = equals_sign(self, one), first = one->first + 1;
    if (sign == one->end) {
        set_targets(self, first, one->end, text_of(walk(self, index + 1, one->match, times)));
        return;
    }
    const token *right = &self->tokens[sign + 1];
    if (sign == first + 1 && sign + 2 < one->end && is(right, "namespace") && right[1].kind == '(') {
        variable *old = find_variable(self, &self->tokens[first], &no_attribute);
        if (old) old->is_namespace = false;
        set_namespace(self, &self->tokens[first], sign + 3, closing(self, sign + 2, one->end), times);
        return;
    }
    set_targets(self, first, sign, expression(self, sign + 1, one->end, times));
}

static value element(value list) {
    if (list.kind == MESSAGES) return bounds(MESSAGE, list.size / larger(list.count, 1), 2);
    double size = list.kind == ABSENT ? 0 : list.kind == TEXT ? 4 : list.size;
    return (value){OTHER, size, size, list.depth};
}

static bool grows(double before, double between, double after) {
    double last = after - between;
    if (!(after <= MOST_WORK)) return true; /* infinite sizes and NaN included */
    return last > (between - before) * 1.000001 + 0.5;
}

/* How many runs of a loop let a value reach every variable that is assigned in it: one for each, and
 * two more to see how it grows. */
static size_t runs_of(const analysis *self, size_t from, size_t to) {
    size_t runs = 3;
    if (self->macro_count) return self->variable_count + runs; /* macros assign variables too */
    for (size_t i = from; i < to; i++) {
        const tag *one = &self->tags[i];
        if (one->output || !is_one_of(statement(self, i), "set for")) continue;
        runs += 1 + (size_t)commas(self, one->first, one->end);
    }
    return runs;
}

/* Finds how each variable grows from one run of a loop to the next, and leaves them as they are
 * after `count` runs. Refuses the loop if one grows by more each time. */
static void settle(analysis *self, size_t from, size_t to, double count) {
    /* Not on the stack: loops are inside one another, and a thread may have little of it. */
    double(*sizes)[3] = calloc(3 * (size_t)VARIABLES, sizeof *sizes);
    if (!sizes) {
        refuse(self, "does not fit into memory");
        return;
    }
    double(*counts)[3] = sizes + VARIABLES, (*depths)[3] = counts + VARIABLES;
    size_t runs = runs_of(self, from, to), known = 0;
    for (size_t run = 0; run < runs && !*self->why; run++) {
        walk(self, from, to, 0);
        known = self->variable_count;
        if (run + 3 < runs) continue;
        for (size_t i = 0; i < known; i++) {
            sizes[i][run + 3 - runs] = self->variables[i].value.size;
            counts[i][run + 3 - runs] = self->variables[i].value.count;
            depths[i][run + 3 - runs] = self->variables[i].value.depth;
        }
    }
    for (size_t i = 0; i < known && !*self->why; i++) {
        variable *one = &self->variables[i];
        if (grows(sizes[i][0], sizes[i][1], sizes[i][2]) ||
            grows(counts[i][0], counts[i][1], counts[i][2])) {
            refuse(self, "makes '%.*s' grow faster than by adding to it",
                   one->name.length > 40 ? 40 : one->name.length, one->name.text);
        }
        one->value.size += larger(0, sizes[i][2] - sizes[i][1]) * count;
        one->value.count += larger(0, counts[i][2] - counts[i][1]) * count;
        one->value.depth += larger(0, depths[i][2] - depths[i][1]) * count;
    }
    free(sizes);
}

static double walk_for(analysis *self, size_t index, double times) {
    const tag *one = &self->tags[index];
    variable *before = malloc(sizeof self->variables);
    size_t known = self->variable_count, in = one->first + 1;
    double size = 0;
    while (in < one->end && !is(&self->tokens[in], "in")) in++;
    for (size_t i = in; i < one->end; i++) {
        if (is(&self->tokens[i], "recursive")) refuse(self, "has a recursive loop");
    }
    if (!before) refuse(self, "does not fit into memory");
    size_t condition = in;
    for (int depth = 0; condition < one->end && (depth || !is(&self->tokens[condition], "if"));) {
        depth += strchr("([{", self->tokens[condition].kind) != NULL;
        depth -= strchr(")]}", self->tokens[condition].kind) != NULL;
        condition++;
    }
    value list = expression(self, in + 1, condition, times);
    if (!*self->why) {
        const token loop = {'n', "loop", 4};
        memcpy(before, self->variables, sizeof self->variables);
        set_targets(self, one->first + 1, in, element(list));
        assign(self, &loop, &no_attribute, text_of(element(list).size + 20));
        expression(self, condition + 1, one->end, times * list.count); /* for each element */
        /* With `conditional` no variable becomes smaller from one run to the next, so that growth
         * shows; the rest of a run may not happen either, after break and continue. */
        self->conditional++;
        settle(self, index + 1, one->match, list.count);
        size = list.count * walk(self, index + 1, one->match, times * list.count);
        self->conditional--;
        /* The loop may not run at all. */
        for (size_t i = 0; i < known; i++) {
            self->variables[i].value = either(self->variables[i].value, before[i].value);
        }
    }
    free(before);
    return size;
}

static void add_macro(analysis *self, size_t index) {
    const tag *one = &self->tags[index];
    const token *name = &self->tokens[one->first + 1];
    bool sound = one->end > one->first + 2 && name->kind == 'n' && name[1].kind == '(';
    macro *known = sound ? find_macro(self, name) : NULL;
    if (known && known->tag == index) return; /* a loop comes by again */
    if (!sound || known || find_variable(self, name, &no_attribute) || self->macro_count == MACROS) {
        refuse(self, "has a macro whose name is missing or used twice");
        return;
    }
    self->macros[self->macro_count++] = (macro){*name, index, false};
}

/* Walks a block; returns the bytes of its output. `times` is how often it happens. */
static double walk(analysis *self, size_t from, size_t to, double times) {
    double size = 0;
    int conditional = self->conditional;
    if (++self->depth > WALKS_DEEP) refuse(self, "nests blocks and macros too deeply");
    for (size_t i = from; i < to && !*self->why; i++) {
        const tag *one = &self->tags[i];
        const token *name = statement(self, i);
        if (++self->walks > WALKS) refuse(self, "is too complicated");
        self->work += times * (WORK_OF_TAG + one->text);
        size += one->text;
        if (one->output) {
            size += expression(self, one->first, one->end, times).size;
        } else if (is(name, "set")) {
            walk_set(self, i, times);
            i = one->match;
        } else if (is(name, "if")) {
            self->conditional++;
            expression(self, one->first + 1, one->end, times);
            size += walk(self, i + 1, one->match, times);
            self->conditional--;
            i = one->match;
        } else if (is(name, "for")) {
            size += walk_for(self, i, times);
            i = one->match;
        } else if (is(name, "macro")) {
            add_macro(self, i);
            i = one->match;
        } else {
            if (is_one_of(name, "elif else")) self->conditional++; /* of a loop, or of an if */
            expression(self, one->first + 1, one->end, times);
        }
    }
    self->conditional = conditional;
    self->depth--;
    return size + self->tags[to].text;
}

static void define(analysis *self, const char *name, value given) {
    token as = {'n', name, (int)strlen(name)};
    assign(self, &as, &no_attribute, given);
}

/* Whether a template of `length` bytes is harmless with a conversation of these weights. On failure
 * `why` says what is wrong, to follow "the model's chat template". */
/* ---- what the engine's parser survives -------------------------------------------------------- */

/* The engine parses a template when the tokenizer is opened, long before anybody chats: it recurses
 * for each character of a name, of spaces and of a comment, and the time of a tag grows with the
 * square of its length. The same bounds are in runtime/chat_template/genai_bounds.py. */
enum { MOST_RUN = 1000, MOST_COMMENT = 2000, MOST_TAG = 3000, MOST_TAGS = 800, MOST_BLOCKS = 100 };

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static bool is_word(char c) { return is_letter(c) || is_digit(c) || (unsigned char)c >= 0x80; }

static bool has_long_run(const char *text, size_t length) {
    size_t spaces = 0, letters = 0;
    for (size_t i = 0; i < length; i++) {
        spaces = is_space(text[i]) ? spaces + 1 : 0;
        letters = is_word(text[i]) ? letters + 1 : 0;
        if (spaces > MOST_RUN || letters > MOST_RUN) return true;
    }
    return false;
}

/* Where a tag ends whose inside starts at `c`: at its `mark`, or NULL if that is nowhere or too far. */
static const char *bounded_tag(const char *c, const char *end, char mark) {
    for (int pieces = 0; pieces < MOST_TAG && c + 1 < end; pieces++) {
        if (c[0] == mark && c[1] == '}') return c;
        char quote = *c++;
        if (quote != '"' && quote != '\'') continue;
        while (c < end && *c != quote) c += *c == '\\' && c + 1 < end ? 2 : 1;
        if (c >= end) return NULL;
        c++;
    }
    return NULL;
}

/* How much deeper a statement, whose inside starts at `c`, leads into blocks: 1, 0 or -1. */
static int deeper(const char *c, const char *end) {
    if (c < end && strchr("-+~", *c)) c++;
    while (c < end && is_space(*c)) c++;
    const char *start = c;
    while (c < end && is_letter(*c)) c++;
    const token name = {'n', start, (int)(c - start)};
    if (is_one_of(&name, "if for macro filter call generation")) return 1;
    return name.length > 3 && memcmp(start, "end", 3) == 0 ? -1 : 0;
}

/* Whether the engine survives to parse the template; `why` says what it has otherwise. */
static bool template_opens(const char *text, size_t length, char why[WHY]) {
    const char *c = text, *end = text + length;
    int depth = 0, tags = 0;
    why[0] = 0;
    if (has_long_run(text, length)) explain(why, "has a name or a run of spaces that is too long");
    while (!*why && c + 1 < end) {
        if (c[0] != '{' || !strchr("{%#", c[1])) {
            c++;
            continue;
        }
        char kind = c[1];
        const char *close = c += 2;
        if (kind == '#') {
            while (close + 1 < end && (close[0] != '#' || close[1] != '}')) close++;
            if (close + 1 >= end || close - c > MOST_COMMENT) explain(why, "has a comment that is too long");
        } else {
            close = bounded_tag(c, end, kind == '{' ? '}' : '%');
            if (!close) explain(why, "has a tag that is too long, or without an end");
            if (++tags > MOST_TAGS) explain(why, "has too many tags");
            if (kind == '%' && close) depth += deeper(c, close);
            if (depth > MOST_BLOCKS) explain(why, "has too many blocks inside one another");
        }
        if (close) c = close + 2;
    }
    return !*why;
}

static bool template_check(const char *text, size_t length, weights weights, char why[WHY]) {
    analysis *self = length <= TEMPLATE_BYTES ? calloc(1, sizeof *self) : NULL;
    why[0] = 0;
    if (!self) {
        explain(why, length <= TEMPLATE_BYTES ? "does not fit into memory"
                                              : "has more than %d bytes", TEMPLATE_BYTES);
        return false;
    }
    self->why = why;
    self->weights = weights;
    self->tokens = malloc((length + 2) * sizeof *self->tokens);
    self->tags = malloc((length / 4 + 2) * sizeof *self->tags);
    if (!self->tokens || !self->tags) {
        refuse(self, "does not fit into memory");
    } else {
        check_spaces(self, text);
        read_tags(self, text, text + length);
        if ((double)self->token_count * (double)length > MOST_PARSING) {
            refuse(self, "has too many tags");
        }
        match_tags(self);
        define(self, "messages", bounds(MESSAGES, weights.bytes, weights.messages));
        define(self, "add_generation_prompt", text_of(5));
        /* Special tokens come from the tokenizer's settings. */
        define(self, "bos_token", text_of(64));
        define(self, "eos_token", text_of(64));
        if (!*why) walk(self, 0, self->tag_count, 1);
        if (!(self->work <= MOST_WORK)) refuse(self, "takes too long for this conversation: shorten it");
    }
    free(self->tags);
    free(self->tokens);
    free(self);
    return !*why;
}

#endif
