/* Saved sessions: a JSON file with the tokens, the messages, and what package they are for. */
#ifndef LLAMA_ONNX_SESSION_FILE_H
#define LLAMA_ONNX_SESSION_FILE_H

#include "session.h"

/* Writes the hash of the file that says what the package is. */
static int package_hash(llama_onnx_session *self, char hex[65]) {
    const char *folder = self->model->package;
    bool listed = is_file(folder, "manifest.json");
    if (hash_file(folder, listed ? "manifest.json" : "genai_config.json", hex)) {
        return LLAMA_ONNX_OK;
    }
    return fail(&self->call, "%s cannot be read.", folder);
}

static void put_number(buffer *to, size_t number) {
    char text[24];
    snprintf(text, sizeof text, "%zu", number);
    put(to, text);
}

static void put_session(llama_onnx_session *self, const char *hash, buffer *to) {
    size_t from = 0;
    put(to, "{\"llama_onnx_session\": ");
    put_number(to, SESSION_FORMAT);
    put(to, ", \"package\": \"");
    put(to, hash);
    put(to, "\", \"adapter\": ");
    if (self->adapter) put_text(to, self->adapter, strlen(self->adapter));
    put(to, self->adapter ? ", \"tokens\": [" : "null, \"tokens\": [");
    for (size_t i = 0; i < self->tokens.count; i++) {
        if (i) put(to, ", ");
        put_number(to, (size_t)self->tokens.all[i]);
    }
    put(to, "], \"parts\": [");
    for (size_t i = 0; i < self->message_count; i++) {
        const struct message_end *end = &self->ends[i];
        put(to, i ? ", {\"tokens\": " : "{\"tokens\": ");
        put_number(to, end->tokens);
        put(to, end->answer ? ", \"answer\": true, \"messages\": ["
                            : ", \"answer\": false, \"messages\": [");
        put_bytes(to, self->messages.text + from, end->bytes - from);
        put(to, "]}");
        from = end->bytes + 2; /* the comma between messages */
    }
    put(to, "]}\n");
}

static int save_session(llama_onnx_session *self, const char *path) {
    call *call = &self->call;
    char hash[65];
    buffer text = {0}, temporary = {0};
    if (package_hash(self, hash)) return LLAMA_ONNX_FAILED;
    put_session(self, hash, &text);
    put(&temporary, path);
    put(&temporary, ".part");
    int status = text.full || temporary.full ? out_of_memory(call) : LLAMA_ONNX_OK;
    FILE *file = status ? NULL : create_file(temporary.text);
    if (!status && !file) status = fail(call, "%s cannot be written.", path);
    if (file) {
        bool written = fwrite(text.text, 1, text.size, file) == text.size;
        written = fclose(file) == 0 && written;
        if (!written || !replace_file(temporary.text, path)) {
            remove_file(temporary.text);
            status = fail(call, "%s cannot be written.", path);
        }
    }
    free(text.text);
    free(temporary.text);
    return status;
}

static int damaged(llama_onnx_session *self, const char *path, const char *how) {
    return fail(&self->call, "%.900s cannot be loaded: it %s.", path, how);
}

/* Reads the tokens and messages of a file into an empty session. */
static int read_parts_of(llama_onnx_session *to, const json *file, const char *path) {
    const json_node *tokens = json_get(file, file->nodes, "tokens");
    const json_node *parts = json_get(file, file->nodes, "parts");
    bool lists = tokens && tokens->kind == JSON_LIST && parts && parts->kind == JSON_LIST;
    int64_t number;
    int status = lists ? LLAMA_ONNX_OK : damaged(to, path, "has no tokens");
    for (const json_node *i = lists ? json_first(file, tokens) : NULL; i && !status;
         i = json_next(file, i)) {
        int32_t id = json_integer(i, 0, ANY_INT, &number) ? (int32_t)number : -1;
        status = add_tokens(to, &id, 1);
    }
    for (const json_node *i = lists ? json_first(file, parts) : NULL; i && !status;
         i = json_next(file, i)) {
        const json_node *list = i->kind == JSON_OBJECT ? json_get(file, i, "messages") : NULL;
        const json_node *count = list ? json_get(file, i, "tokens") : NULL;
        buffer given = {0}, checked = {0};
        weights weights;
        char why[WHY];
        if (!count || !json_integer(count, 0, (int64_t)to->tokens.count, &number)) {
            return damaged(to, path, "has damaged messages");
        }
        put_value(&given, file, list);
        if (given.full || !read_messages(given.text, &checked, &weights, why)) {
            status = damaged(to, path, "has damaged messages");
        } else {
            status = add_messages(to, checked.text + 1, checked.size - 2,
                                  is_true(file, i, "answer"));
        }
        if (!status) to->ends[to->message_count - 1].tokens = (size_t)number;
        free(given.text);
        free(checked.text);
    }
    return status;
}

static int check_session_file(llama_onnx_session *self, const json *file, const char *path) {
    const json_node *root = file->nodes;
    bool object = root->kind == JSON_OBJECT;
    const json_node *format = object ? json_get(file, root, "llama_onnx_session") : NULL;
    const json_node *adapter = object ? json_get(file, root, "adapter") : NULL;
    int64_t number;
    char hash[65];
    if (!format || !json_integer(format, 1, ANY_INT, &number)) {
        return damaged(self, path, "is not a saved session");
    }
    if (number > SESSION_FORMAT) return damaged(self, path, "is of a newer version");
    if (package_hash(self, hash)) return LLAMA_ONNX_FAILED;
    if (!json_is_text(json_get(file, root, "package"), hash)) {
        return damaged(self, path, "was saved with another package, or another version of it");
    }
    bool none = !adapter || adapter->kind == JSON_NULL;
    if (self->adapter ? !json_is_text(adapter, self->adapter) : !none) {
        return damaged(self, path, "was saved with another adapter");
    }
    return LLAMA_ONNX_OK;
}

/* Reads a file that is not larger than it needs to be. */
static char *read_session(const char *path, size_t *length) {
    FILE *file = open_file(path);
    int64_t size = file ? file_size(file) : -1;
    char *text = size >= 0 && size <= SESSION_BYTES ? malloc((size_t)size + 1) : NULL;
    *length = text ? fread(text, 1, (size_t)size, file) : 0;
    if (text) text[*length] = 0;
    if (file) fclose(file);
    return text;
}

static int load_session(llama_onnx_session *self, const char *path) {
    llama_onnx_session read = {.model = self->model, .max_tokens = self->max_tokens};
    json file;
    size_t length;
    char *text = read_session(path, &length);
    if (!text) return fail(&self->call, "%.900s cannot be read.", path);
    int status = LLAMA_ONNX_OK;
    if (!json_parse(&file, text, length)) status = damaged(self, path, file.why);
    if (!status) status = check_session_file(self, &file, path);
    if (!status && read_parts_of(&read, &file, path)) {
        status = fail(&self->call, "%s", read.call.error);
    }
    if (!status) {
        ids tokens = self->tokens;
        buffer messages = self->messages;
        struct message_end *ends = self->ends;
        size_t common = 0;
        while (common < read.tokens.count && common < self->cached &&
               read.tokens.all[common] == tokens.all[common]) common++;
        self->cached = common;
        self->tokens = read.tokens;
        self->messages = read.messages;
        self->ends = read.ends;
        self->message_count = read.message_count;
        self->message_room = read.message_room;
        self->has_text = !read.message_count && read.tokens.count;
        self->stats = (llama_onnx_stats){0};
        read.tokens = tokens;
        read.messages = messages;
        read.ends = ends;
    }
    free(read.tokens.all);
    free(read.messages.text);
    free(read.ends);
    json_free(&file);
    free(text);
    return status;
}

#endif
