// What goes into a model and comes out of it.
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;
using System.Text;

namespace LlamaOnnx
{
    /// <summary>A failure, with the message of the C library.</summary>
    public sealed class ModelException : Exception
    {
        /// <summary>Another thread, or a callback of the same answer, is using the model or session.</summary>
        public bool IsBusy { get; }

        internal ModelException(string message, bool busy = false) : base(message)
        {
            IsBusy = busy;
        }
    }

    /// <summary>One message of a conversation; the role is system, user or assistant.</summary>
    public sealed class Message
    {
        public string Role { get; }
        public string Content { get; }

        public Message(string role, string content)
        {
            Role = role ?? throw new ArgumentNullException(nameof(role));
            Content = content ?? throw new ArgumentNullException(nameof(content));
        }

        internal static string Json(IEnumerable<Message> messages)
        {
            if (messages == null) throw new ArgumentNullException(nameof(messages));
            var json = new StringBuilder("[");
            foreach (var message in messages)
            {
                if (message == null)
                    throw new ArgumentException("a message is null.", nameof(messages));
                json.Append(json.Length > 1 ? ", " : "");
                Quote(json.Append("{\"role\": "), message.Role);
                Quote(json.Append(", \"content\": "), message.Content);
                json.Append('}');
            }
            return json.Append(']').ToString();
        }

        private static void Quote(StringBuilder json, string text)
        {
            json.Append('"');
            foreach (var c in text)
            {
                if (c == '"' || c == '\\') json.Append('\\').Append(c);
                else if (c >= ' ') json.Append(c);
                else json.Append("\\u").Append(((int)c).ToString("x4", CultureInfo.InvariantCulture));
            }
            json.Append('"');
        }
    }

    /// <summary>How a package is opened.</summary>
    public sealed class ModelOptions
    {
        /// <summary>"auto", "cpu" or "directml"; null is "auto".</summary>
        public string Provider { get; set; }

        /// <summary>Folder of the libraries; null: those beside the C library.</summary>
        public string Libraries { get; set; }

        /// <summary>First compare every file with the package's SHA256SUMS.</summary>
        public bool CheckHashes { get; set; }
    }

    /// <summary>How an answer is chosen. Model.DefaultSampling() returns the package's own.</summary>
    public sealed class Sampling
    {
        public int MaxNewTokens { get; set; }

        /// <summary>0 is greedy: the next four and the seed then have no effect.</summary>
        public double Temperature { get; set; }

        /// <summary>0: all tokens.</summary>
        public int TopK { get; set; }

        /// <summary>1: off.</summary>
        public double TopP { get; set; } = 1;

        /// <summary>0: off. Not with a guide, and not on DirectML.</summary>
        public double MinP { get; set; }

        /// <summary>1: off.</summary>
        public double RepetitionPenalty { get; set; } = 1;

        /// <summary>0: off.</summary>
        public int NoRepeatNgramSize { get; set; }

        /// <summary>The same seed gives the same answer; -1: another one each time.</summary>
        public long Seed { get; set; } = -1;

        /// <summary>Texts that end the answer and are left out of it.</summary>
        public IList<string> Stop { get; } = new List<string>();

        /// <summary>What the answer must be, of the kind GuideKind; null: anything.</summary>
        public string Guide { get; set; }

        /// <summary>"json_schema", "regex" or "lark_grammar".</summary>
        public string GuideKind { get; set; }

        internal static Sampling From(Native.llama_onnx_sampling c) => new Sampling
        {
            MaxNewTokens = c.max_new_tokens,
            Temperature = c.temperature,
            TopK = c.top_k,
            TopP = c.top_p,
            MinP = c.min_p,
            RepetitionPenalty = c.repetition_penalty,
            NoRepeatNgramSize = c.no_repeat_ngram_size,
            Seed = c.seed,
        };

        internal Native.llama_onnx_sampling ToNative(Memory memory) => new Native.llama_onnx_sampling
        {
            size = Memory.Size<Native.llama_onnx_sampling>(),
            max_new_tokens = MaxNewTokens,
            temperature = Temperature,
            top_k = TopK,
            top_p = TopP,
            min_p = MinP,
            repetition_penalty = RepetitionPenalty,
            no_repeat_ngram_size = NoRepeatNgramSize,
            seed = Seed,
            stop = memory.Add(Stop, nameof(Stop)),
            stop_count = (UIntPtr)(uint)Stop.Count,
            guide = memory.Add(Guide, nameof(Guide)),
            guide_kind = memory.Add(GuideKind, nameof(GuideKind)),
        };
    }

    /// <summary>Why an answer ended.</summary>
    public enum Finish
    {
        /// <summary>No answer yet, or one that failed.</summary>
        NotFinished = 0,

        /// <summary>The model ended it.</summary>
        End = 1,

        /// <summary>MaxNewTokens, or the session is full.</summary>
        Length = 2,

        /// <summary>A stop text.</summary>
        Stop = 3,

        /// <summary>Cancelled, or by the callback.</summary>
        Stopped = 4,
    }

    /// <summary>Counts and times of a session and its last answer.</summary>
    public sealed class Stats
    {
        /// <summary>Tokens of the session.</summary>
        public long Tokens { get; }

        /// <summary>Tokens before the answer.</summary>
        public long PromptTokens { get; }

        /// <summary>Those of the prompt that the model had read already.</summary>
        public long CachedTokens { get; }

        /// <summary>Tokens of the answer, the end token included.</summary>
        public long GeneratedTokens { get; }

        public double PromptSeconds { get; }
        public double FirstTokenSeconds { get; }
        public double AnswerSeconds { get; }

        /// <summary>After the first token; 0 for a single one.</summary>
        public double TokensPerSecond { get; }

        public Finish Finish { get; }

        internal Stats(Native.llama_onnx_stats c)
        {
            Tokens = (long)c.tokens;
            PromptTokens = (long)c.prompt_tokens;
            CachedTokens = (long)c.cached_tokens;
            GeneratedTokens = (long)c.generated_tokens;
            PromptSeconds = c.prompt_seconds;
            FirstTokenSeconds = c.first_token_seconds;
            AnswerSeconds = c.answer_seconds;
            TokensPerSecond = c.tokens_per_second;
            Finish = (Finish)c.finish;
        }
    }

    /// <summary>Memory that the C library reads during a call.</summary>
    internal sealed class Memory : IDisposable
    {
        private readonly List<IntPtr> _blocks = new List<IntPtr>();

        internal static UIntPtr Size<T>() => (UIntPtr)(uint)Marshal.SizeOf<T>();

        internal IntPtr Add(string text, string name)
        {
            if (text == null) return IntPtr.Zero;
            var bytes = Strings.Bytes(text, name);
            var block = Block(bytes.Length);
            Marshal.Copy(bytes, 0, block, bytes.Length);
            return block;
        }

        internal IntPtr Add(IList<string> texts, string name)
        {
            if (texts.Count == 0) return IntPtr.Zero;
            var pointers = Block(texts.Count * IntPtr.Size);
            for (var i = 0; i < texts.Count; i++)
            {
                if (texts[i] == null) throw new ArgumentException("a text is null.", name);
                Marshal.WriteIntPtr(pointers, i * IntPtr.Size, Add(texts[i], name));
            }
            return pointers;
        }

        private IntPtr Block(int size)
        {
            var block = Marshal.AllocHGlobal(size);
            _blocks.Add(block);
            return block;
        }

        public void Dispose()
        {
            foreach (var block in _blocks) Marshal.FreeHGlobal(block);
            _blocks.Clear();
        }
    }

    /// <summary>Passes pieces of an answer on. No exception may cross the C library: one that the
    /// receiver throws ends the answer, and is thrown again after the call.</summary>
    internal sealed class Receiver
    {
        private readonly Func<string, bool> _onPiece;
        private ExceptionDispatchInfo _thrown;

        internal Native.llama_onnx_callback Callback { get; }

        internal Receiver(Func<string, bool> onPiece)
        {
            _onPiece = onPiece;
            Callback = Receive;
        }

        private int Receive(IntPtr text, IntPtr user)
        {
            try
            {
                return _thrown == null && (_onPiece == null || _onPiece(Strings.Text(text))) ? 0 : 1;
            }
            catch (Exception error)
            {
                _thrown = ExceptionDispatchInfo.Capture(error);
                return 1;
            }
        }

        internal void Rethrow() => _thrown?.Throw();
    }
}
