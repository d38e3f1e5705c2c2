/* How a session chooses the next token, in the order of transformers: repetition, n-grams,
 * temperature, top-k, top-p, min-p. */
#ifndef LLAMA_ONNX_SAMPLING_H
#define LLAMA_ONNX_SAMPLING_H

#include "llama_onnx.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define GREEDY_BELOW 1e-6 /* smaller temperatures are greedy */
#define MOST_TEMPERATURE 1e6

typedef struct candidate {
    float score;
    int32_t id;
    double weight;
} candidate;

typedef struct sampler {
    llama_onnx_sampling how;
    size_t vocab_size;
    float *scores;
    candidate *candidates;
    bool *seen; /* tokens that the text has */
    uint64_t state;
} sampler;

/* SplitMix64: every seed gives good numbers. */
static uint64_t random_bits(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* What is wrong with the options, as a sentence; NULL if nothing is. NaN is never in range. */
static const char *sampling_wrong(const llama_onnx_sampling *how) {
    if (how->max_new_tokens < 1) return "max_new_tokens must be at least 1.";
    if (!(how->temperature >= 0 && how->temperature <= MOST_TEMPERATURE)) {
        return "temperature must be a number from 0 (greedy) to 1,000,000.";
    }
    if (!(how->top_p >= 0 && how->top_p <= 1)) return "top_p must be a number from 0 to 1 (off).";
    if (!(how->min_p >= 0 && how->min_p <= 1)) return "min_p must be a number from 0 (off) to 1.";
    if (!(how->repetition_penalty >= 1e-6 && how->repetition_penalty <= 1e6)) {
        return "repetition_penalty must be a number above 0, of which 1 is off.";
    }
    if (how->no_repeat_ngram_size < 0) return "no_repeat_ngram_size must be 0 (off) or more.";
    return NULL;
}

static bool is_greedy(const llama_onnx_sampling *how) { return how->temperature < GREEDY_BELOW; }

static void sampler_free(sampler *self) {
    free(self->scores);
    free(self->candidates);
    free(self->seen);
}

/* Returns false if there is no memory. `tokens` are the text so far. */
static bool sampler_init(sampler *self, const llama_onnx_sampling *how, size_t vocab_size,
                         uint64_t seed, const int32_t *tokens, size_t count) {
    *self = (sampler){.how = *how, .vocab_size = vocab_size, .state = seed};
    self->scores = malloc(vocab_size * sizeof *self->scores);
    self->candidates = malloc(vocab_size * sizeof *self->candidates);
    self->seen = calloc(vocab_size, sizeof *self->seen);
    if (!self->scores || !self->candidates || !self->seen) return false;
    for (size_t i = 0; i < count; i++) self->seen[tokens[i]] = true;
    return true;
}

static void penalize(sampler *self) {
    double penalty = self->how.repetition_penalty;
    for (size_t i = 0; penalty != 1 && i < self->vocab_size; i++) {
        if (!self->seen[i]) continue;
        double score = self->scores[i];
        score = score < 0 ? score * penalty : score / penalty;
        self->scores[i] = (float)(score > 3.4e38 ? 3.4e38 : score < -3.4e38 ? -3.4e38 : score);
    }
}

/* Removes the tokens that would complete a sequence of tokens which the text has already. */
static void ban_repeats(sampler *self, const int32_t *tokens, size_t count) {
    size_t size = (size_t)self->how.no_repeat_ngram_size, left = self->vocab_size;
    if (!size || count < size) return;
    const int32_t *last = tokens + count - (size - 1);
    for (size_t i = 0; i + size <= count; i++) {
        if (memcmp(tokens + i, last, (size - 1) * sizeof *last)) continue;
        float *score = &self->scores[tokens[i + size - 1]];
        if (*score == -INFINITY) continue;
        if (left-- == 1) return; /* one must stay */
        *score = -INFINITY;
    }
}

static int by_score(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* Draws one of the candidates, which are sorted, the likeliest first. */
static int32_t draw(sampler *self, size_t count) {
    const llama_onnx_sampling *how = &self->how;
    candidate *all = self->candidates;
    double total = 0, sum = 0;
    for (size_t i = 0; i < count; i++) {
        all[i].weight = exp(((double)all[i].score - all[0].score) / how->temperature);
        total += all[i].weight;
    }
    size_t kept = count;
    if (how->top_p < 1) {
        for (kept = 0; kept < count && (!kept || sum < how->top_p * total); kept++) {
            sum += all[kept].weight;
        }
    }
    while (kept > 1 && all[kept - 1].weight < how->min_p) kept--;
    for (size_t i = sum = 0; i < kept; i++) sum += all[i].weight;
    double goal = (double)(random_bits(&self->state) >> 11) * 0x1p-53 * sum;
    for (size_t i = 0; i + 1 < kept; i++) {
        if (goal < all[i].weight) return all[i].id;
        goal -= all[i].weight;
    }
    return all[kept - 1].id;
}

/* The next token after `tokens`, -1 if the logits are not numbers. */
static int32_t choose(sampler *self, const float *logits, const int32_t *tokens, size_t count) {
    size_t best = 0, size = self->vocab_size, top_k;
    for (size_t i = 0; i < size; i++) {
        if (!isfinite(logits[i])) return -1;
    }
    memcpy(self->scores, logits, size * sizeof *logits);
    penalize(self);
    ban_repeats(self, tokens, count);
    for (size_t i = 1; i < size; i++) {
        if (self->scores[i] > self->scores[best]) best = i;
    }
    int32_t id = (int32_t)best;
    if (!is_greedy(&self->how)) {
        size_t found = 0;
        /* What is so unlikely weighs nothing, whatever the other options are. */
        double least = self->scores[best] - 80 * self->how.temperature;
        for (size_t i = 0; i < size; i++) {
            if (self->scores[i] < least) continue;
            self->candidates[found++] = (candidate){self->scores[i], (int32_t)i, 0};
        }
        qsort(self->candidates, found, sizeof *self->candidates, by_score);
        top_k = self->how.top_k > 0 ? (size_t)self->how.top_k : found;
        id = draw(self, top_k < found ? top_k : found);
    }
    self->seen[id] = true;
    return id;
}

#endif
