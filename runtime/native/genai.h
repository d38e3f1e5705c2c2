/* The functions of onnxruntime-genai's C API that we use; the library is loaded at run time. */
#ifndef LLAMA_ONNX_GENAI_H
#define LLAMA_ONNX_GENAI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define CALL __stdcall
#else
#define CALL
#endif

typedef struct OgaResult OgaResult;
typedef struct OgaConfig OgaConfig;
typedef struct OgaModel OgaModel;
typedef struct OgaTokenizer OgaTokenizer;
typedef struct OgaTokenizerStream OgaTokenizerStream;
typedef struct OgaSequences OgaSequences;
typedef struct OgaGeneratorParams OgaGeneratorParams;
typedef struct OgaGenerator OgaGenerator;
typedef struct OgaAdapters OgaAdapters;
typedef struct OgaTensor OgaTensor;

enum { OGA_FLOAT32 = 1, OGA_FLOAT16 = 10 }; /* of OgaElementType */

#define OGA_FUNCTIONS(F)                                                                        \
    F(const char *, OgaResultGetError, (const OgaResult *))                                     \
    F(void, OgaDestroyResult, (OgaResult *))                                                    \
    F(void, OgaDestroyString, (const char *))                                                   \
    F(void, OgaSetTelemetryEnabled, (bool))                                                     \
    F(OgaResult *, OgaCreateConfig, (const char *, OgaConfig **))                               \
    F(OgaResult *, OgaConfigClearProviders, (OgaConfig *))                                      \
    F(OgaResult *, OgaConfigAppendProvider, (OgaConfig *, const char *))                        \
    F(OgaResult *, OgaConfigSetProviderOption,                                                  \
      (OgaConfig *, const char *, const char *, const char *))                                  \
    F(void, OgaDestroyConfig, (OgaConfig *))                                                    \
    F(OgaResult *, OgaCreateModelFromConfig, (const OgaConfig *, OgaModel **))                  \
    F(OgaResult *, OgaModelGetDeviceType, (const OgaModel *, const char **))                    \
    F(void, OgaDestroyModel, (OgaModel *))                                                      \
    F(OgaResult *, OgaCreateTokenizer, (const OgaModel *, OgaTokenizer **))                     \
    F(OgaResult *, OgaUpdateTokenizerOptions,                                                   \
      (OgaTokenizer *, const char *const *, const char *const *, size_t))                       \
    F(OgaResult *, OgaTokenizerEncode, (const OgaTokenizer *, const char *, OgaSequences *))    \
    F(OgaResult *, OgaTokenizerApplyChatTemplate,                                               \
      (const OgaTokenizer *, const char *, const char *, const char *, bool, const char **))    \
    F(void, OgaDestroyTokenizer, (OgaTokenizer *))                                              \
    F(OgaResult *, OgaCreateTokenizerStream, (const OgaTokenizer *, OgaTokenizerStream **))     \
    F(OgaResult *, OgaTokenizerStreamDecode, (OgaTokenizerStream *, int32_t, const char **))    \
    F(void, OgaDestroyTokenizerStream, (OgaTokenizerStream *))                                  \
    F(OgaResult *, OgaCreateSequences, (OgaSequences **))                                       \
    F(size_t, OgaSequencesGetSequenceCount, (const OgaSequences *, size_t))                     \
    F(const int32_t *, OgaSequencesGetSequenceData, (const OgaSequences *, size_t))             \
    F(void, OgaDestroySequences, (OgaSequences *))                                              \
    F(OgaResult *, OgaCreateGeneratorParams, (const OgaModel *, OgaGeneratorParams **))         \
    F(OgaResult *, OgaGeneratorParamsSetSearchNumber,                                           \
      (OgaGeneratorParams *, const char *, double))                                             \
    F(OgaResult *, OgaGeneratorParamsSetSearchBool, (OgaGeneratorParams *, const char *, bool)) \
    F(OgaResult *, OgaGeneratorParamsSetGuidance,                                               \
      (OgaGeneratorParams *, const char *, const char *, bool))                                 \
    F(void, OgaDestroyGeneratorParams, (OgaGeneratorParams *))                                  \
    F(OgaResult *, OgaCreateGenerator,                                                          \
      (const OgaModel *, const OgaGeneratorParams *, OgaGenerator **))                          \
    F(OgaResult *, OgaGenerator_AppendTokens, (OgaGenerator *, const int32_t *, size_t))        \
    F(bool, OgaGenerator_IsDone, (OgaGenerator *))                                              \
    F(OgaResult *, OgaGenerator_GenerateNextToken, (OgaGenerator *))                            \
    F(OgaResult *, OgaGenerator_GetNextTokens,                                                  \
      (const OgaGenerator *, const int32_t **, size_t *))                                       \
    F(OgaResult *, OgaGenerator_SetRuntimeOption, (OgaGenerator *, const char *, const char *)) \
    F(OgaResult *, OgaGenerator_RewindTo, (OgaGenerator *, size_t))                             \
    F(OgaResult *, OgaGenerator_GetLogits, (OgaGenerator *, OgaTensor **))                      \
    F(OgaResult *, OgaGenerator_GetOutput, (const OgaGenerator *, const char *, OgaTensor **))  \
    F(OgaResult *, OgaTensorGetType, (OgaTensor *, int32_t *))                                  \
    F(OgaResult *, OgaTensorGetShapeRank, (OgaTensor *, size_t *))                              \
    F(OgaResult *, OgaTensorGetShape, (OgaTensor *, int64_t *, size_t))                         \
    F(OgaResult *, OgaTensorGetData, (OgaTensor *, void **))                                    \
    F(void, OgaDestroyTensor, (OgaTensor *))                                                    \
    F(OgaResult *, OgaCreateAdapters, (const OgaModel *, OgaAdapters **))                       \
    F(OgaResult *, OgaLoadAdapter, (OgaAdapters *, const char *, const char *))                 \
    F(OgaResult *, OgaSetActiveAdapter, (OgaGenerator *, OgaAdapters *, const char *))          \
    F(void, OgaDestroyAdapters, (OgaAdapters *))                                                \
    F(void, OgaDestroyGenerator, (OgaGenerator *))

typedef struct api {
#define MEMBER(result, name, parameters) result(CALL *name) parameters;
    OGA_FUNCTIONS(MEMBER)
#undef MEMBER
} api;

static const struct {
    const char *name;
    size_t offset;
} api_members[] = {
#define ENTRY(result, name, parameters) {#name, offsetof(api, name)},
    OGA_FUNCTIONS(ENTRY)
#undef ENTRY
};

#endif
