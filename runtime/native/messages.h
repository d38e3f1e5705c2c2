/* The messages of a conversation: read strictly, and written again for onnxruntime-genai. */
#ifndef LLAMA_ONNX_MESSAGES_H
#define LLAMA_ONNX_MESSAGES_H

#include "buffer.h"
#include "json.h"
#include "template.h"

enum { MOST_MESSAGES = 10000, MOST_BYTES = 1 << 26 };

static void put_quoted(buffer *to, const char *text, size_t size) {
    for (const char *c = text; c < text + size; c++) {
        char code[8];
        if ((unsigned char)*c >= 0x20 && *c != '"' && *c != '\\') {
            put_bytes(to, c, 1);
        } else {
            snprintf(code, sizeof code, "\\u%04x", (unsigned char)*c);
            put(to, code);
        }
    }
}

static void put_text(buffer *to, const char *text, size_t size) {
    put(to, "\"");
    put_quoted(to, text, size);
    put(to, "\"");
}

static void put_value(buffer *to, const json *from, const json_node *node) {
    bool object = node->kind == JSON_OBJECT;
    switch (node->kind) {
    case JSON_NULL: put(to, "null"); break;
    case JSON_TRUTH: put(to, node->truth ? "true" : "false"); break;
    case JSON_NUMBER: put_bytes(to, node->text, node->length); break;
    case JSON_TEXT: put_text(to, node->text, node->length); break;
    case JSON_LIST:
    case JSON_OBJECT:
        put(to, object ? "{" : "[");
        for (const json_node *i = json_first(from, node); i; i = json_next(from, i)) {
            if (object) put_text(to, i->key, strlen(i->key));
            if (object) put(to, ": ");
            put_value(to, from, i);
            if (i->next) put(to, ", ");
        }
        put(to, object ? "}" : "]");
    }
}

/* The parts of a content, as one text: [{"type": "text", "text": "a"}], joined by line feeds. */
static bool put_parts(buffer *to, const json *from, const json_node *parts, size_t index,
                      char why[WHY]) {
    if (!parts->size) {
        explain(why, "messages[%zu]: 'content' is an empty list: give it a text.", index);
        return false;
    }
    put(to, "\"");
    for (const json_node *i = json_first(from, parts); i; i = json_next(from, i)) {
        const json_node *type = json_get(from, i, "type"), *text = json_get(from, i, "text");
        if (!type || type->kind != JSON_TEXT) {
            explain(why, "messages[%zu]: a part of 'content' must be {\"type\": \"text\", "
                         "\"text\": ...}.", index);
            return false;
        }
        if (!json_is_text(type, "text")) {
            explain(why, "messages[%zu]: 'content' has a part of type '%.40s': this model takes "
                         "text.", index, type->text);
            return false;
        }
        if (!text || text->kind != JSON_TEXT) {
            explain(why, "messages[%zu]: a part of type 'text' needs 'text', a text.", index);
            return false;
        }
        put_quoted(to, text->text, text->length);
        if (i->next) put(to, "\\n");
    }
    put(to, "\"");
    return true;
}

static bool put_message(buffer *to, const json *from, const json_node *message, size_t index,
                        weights *out, char why[WHY]) {
    size_t start = to->size;
    const json_node *role = json_get(from, message, "role");
    const json_node *content = json_get(from, message, "content");
    bool sound = false;
    if (message->kind != JSON_OBJECT) {
        explain(why, "messages[%zu] must be an object such as {\"role\": \"user\", \"content\": "
                     "\"Hello\"}.", index);
    } else if (!role || !content) {
        explain(why, "messages[%zu] has no '%s'.", index, role ? "content" : "role");
    } else if (role->kind != JSON_TEXT || !role->length) {
        explain(why, "messages[%zu]: 'role' must be a text that is not empty.", index);
    } else if (content->kind != JSON_TEXT && content->kind != JSON_LIST) {
        explain(why, "messages[%zu]: 'content' must be a text.", index);
    } else {
        put(to, "{\"role\": ");
        put_value(to, from, role);
        put(to, ", \"content\": ");
        sound = content->kind == JSON_TEXT || put_parts(to, from, content, index, why);
        if (content->kind == JSON_TEXT) put_value(to, from, content);
        out->longest = larger(out->longest, (double)(to->size - start));
        start = to->size;
        for (const json_node *i = json_first(from, message); i; i = json_next(from, i)) {
            if (i == role || i == content) continue;
            put(to, ", ");
            put_text(to, i->key, strlen(i->key));
            put(to, ": ");
            put_value(to, from, i);
        }
        out->extra = larger(out->extra, (double)(to->size - start));
        put(to, "}");
    }
    return sound;
}

/* Reads the messages of a conversation and writes them to `to`, each content as one text. `out` is
 * what they add to the work of a template. On failure `why` is a sentence. */
static bool read_messages(const char *text, buffer *to, weights *out, char why[WHY]) {
    size_t length = strlen(text), index = 0;
    json from;
    *out = (weights){0};
    if (length > MOST_BYTES) {
        explain(why, "the messages have more than %d bytes.", MOST_BYTES);
        return false;
    }
    bool sound = json_parse(&from, text, length);
    if (!sound) {
        explain(why, "the text of the messages %.400s.", from.why);
    } else if (from.nodes->kind != JSON_LIST) {
        explain(why, "messages must be a list of {\"role\": ..., \"content\": ...}.");
        sound = false;
    } else if (!from.nodes->size || from.nodes->size > MOST_MESSAGES) {
        explain(why, "messages must have 1 to %d messages.", MOST_MESSAGES);
        sound = false;
    }
    if (sound) {
        put(to, "[");
        for (const json_node *i = json_first(&from, from.nodes); i && sound;
             i = json_next(&from, i)) {
            sound = put_message(to, &from, i, index++, out, why);
            if (i->next) put(to, ", ");
        }
        put(to, "]");
        out->messages = (double)from.nodes->size;
        out->bytes = (double)to->size;
    }
    if (sound && to->full) {
        explain(why, "there is not enough memory.");
        sound = false;
    }
    json_free(&from);
    return sound;
}

#endif
