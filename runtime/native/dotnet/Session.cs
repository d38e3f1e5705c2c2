using System;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace LlamaOnnx
{
    /// <summary>A text that grows, a conversation for example: the model keeps what it computed of
    /// it, so an answer takes the time of what is new. It holds either messages, or text and tokens.
    /// </summary>
    public sealed partial class Session : IDisposable
    {
        private readonly object _gate = new object();
        private readonly Model _model;
        private readonly SessionHandle _handle;

        internal Session(Model model, ModelHandle opened, int maxTokens, string adapter)
        {
            if (maxTokens < 0) throw new ArgumentOutOfRangeException(nameof(maxTokens));
            _model = model;
            using (var memory = new Memory())
            {
                var c = new Native.llama_onnx_session_options
                {
                    size = Memory.Size<Native.llama_onnx_session_options>(),
                    max_tokens = (UIntPtr)(uint)maxTokens,
                    adapter = memory.Add(adapter, nameof(adapter)),
                };
                var status = Native.llama_onnx_session_open(opened, ref c, out _handle);
                if (status == Native.LLAMA_ONNX_OK) return;
            }
            using (_handle)
                throw new ModelException(
                    _handle.IsInvalid
                        ? "there is not enough memory for a session."
                        : Strings.Text(Native.llama_onnx_session_error(_handle)));
        }

        /// <summary>Adds messages; the chat template formats the conversation.</summary>
        public void Append(params Message[] messages) => Append((IEnumerable<Message>)messages);

        /// <summary>Adds messages; the chat template formats the conversation.</summary>
        public void Append(IEnumerable<Message> messages)
        {
            var json = Strings.Bytes(Message.Json(messages), nameof(messages));
            Call(() => Native.llama_onnx_session_append_messages(_handle, json));
        }

        /// <summary>Adds text as it is.</summary>
        public void AppendText(string text)
        {
            var bytes = Strings.Utf8(text, nameof(text));
            Call(() => Native.llama_onnx_session_append_text(
                _handle, bytes, (UIntPtr)(uint)bytes.Length));
        }

        /// <summary>Adds tokens.</summary>
        public void AppendIds(int[] ids)
        {
            if (ids == null) throw new ArgumentNullException(nameof(ids));
            Call(() => Native.llama_onnx_session_append_ids(
                _handle, ids, (UIntPtr)(uint)ids.Length));
        }

        /// <summary>Generates an answer, adds it to the session and returns it. `onPiece` gets each
        /// piece, and returns false to end the answer. `how` is the package's sampling if null.</summary>
        /// <exception cref="ModelException">The session is busy, or the model failed.</exception>
        /// <exception cref="OperationCanceledException">The token ended the answer, which stays in the
        /// session as far as it came.</exception>
        public string Generate(
            Sampling how = null, Func<string, bool> onPiece = null, CancellationToken token = default)
        {
            token.ThrowIfCancellationRequested();
            var text = new StringBuilder();
            var receiver = new Receiver(piece =>
            {
                text.Append(piece);
                return (onPiece == null || onPiece(piece)) && !token.IsCancellationRequested;
            });
            how = how ?? _model.DefaultSampling();
            using (var memory = new Memory())
            using (token.Register(Cancel))
            {
                var c = how.ToNative(memory);
                Call(() => Native.llama_onnx_session_generate(
                    _handle, ref c, receiver.Callback, IntPtr.Zero), receiver);
            }
            token.ThrowIfCancellationRequested();
            return text.ToString();
        }

        /// <summary>Does the same in a thread of the pool.</summary>
        public Task<string> GenerateAsync(
            Sampling how = null, Action<string> onPiece = null, CancellationToken token = default) =>
            Task.Run(
                () => Generate(
                    how,
                    piece =>
                    {
                        onPiece?.Invoke(piece);
                        return true;
                    },
                    token),
                token);

        /// <summary>Generates an answer in a thread of the pool, and returns its pieces as they come.
        /// Leaving the loop ends the answer.</summary>
        public IEnumerable<string> Stream(Sampling how = null, CancellationToken token = default)
        {
            if (_handle.IsClosed) throw new ObjectDisposedException(nameof(Session));
            return Pieces(how, token);
        }

        private IEnumerable<string> Pieces(Sampling how, CancellationToken token)
        {
            using (var left = CancellationTokenSource.CreateLinkedTokenSource(token))
            using (var pieces = new BlockingCollection<string>())
            {
                var answer = Task.Run(() => Fill(pieces, how, left.Token));
                try
                {
                    foreach (var piece in pieces.GetConsumingEnumerable()) yield return piece;
                    answer.GetAwaiter().GetResult();
                    token.ThrowIfCancellationRequested();
                }
                finally
                {
                    left.Cancel();
                    ((IAsyncResult)answer).AsyncWaitHandle.WaitOne();
                }
            }
        }

        private void Fill(BlockingCollection<string> pieces, Sampling how, CancellationToken token)
        {
            try
            {
                Generate(
                    how,
                    piece =>
                    {
                        pieces.Add(piece);
                        return true;
                    },
                    token);
            }
            catch (OperationCanceledException)
            {
                // the reader left, or its token is cancelled, which it sees itself
            }
            finally
            {
                pieces.CompleteAdding();
            }
        }

        /// <summary>Drops all tokens from a position on, and the messages that they are of.</summary>
        public void Rewind(long position)
        {
            if (position < 0) throw new ArgumentOutOfRangeException(nameof(position));
            Call(() => Native.llama_onnx_session_rewind(_handle, (UIntPtr)(ulong)position));
        }

        /// <summary>Returns the tokens of the session.</summary>
        public int[] Ids()
        {
            var ids = new int[0];
            while (true)
            {
                var size = (UIntPtr)(uint)ids.Length;
                Call(() => Native.llama_onnx_session_ids(_handle, ids, ref size));
                if ((int)size == ids.Length) return ids;
                ids = new int[(int)size];
            }
        }

        /// <summary>Writes tokens and messages to a file. Keys and values are not in it: the first
        /// answer after loading reads all tokens again.</summary>
        public void Save(string path)
        {
            var bytes = Strings.Bytes(path, nameof(path));
            Call(() => Native.llama_onnx_session_save(_handle, bytes));
        }

        /// <summary>Replaces the content by that of a file which the same package saved.</summary>
        public void Load(string path)
        {
            var bytes = Strings.Bytes(path, nameof(path));
            Call(() => Native.llama_onnx_session_load(_handle, bytes));
        }

        /// <summary>Returns counts and times of the session and its last answer.</summary>
        public Stats Stats()
        {
            var size = Memory.Size<Native.llama_onnx_stats>();
            var c = new Native.llama_onnx_stats { size = size };
            Call(() => Native.llama_onnx_session_stats(_handle, ref c, size));
            return new Stats(c);
        }

        /// <summary>Ends the answer in progress, from any thread.</summary>
        public void Cancel()
        {
            try
            {
                Native.llama_onnx_session_cancel(_handle);
            }
            catch (ObjectDisposedException)
            {
                // nothing is in progress
            }
        }

        /// <summary>Cancels, and frees the session when no call needs it.</summary>
        public void Dispose()
        {
            if (_handle.IsClosed) return;
            Cancel();
            _handle.Dispose();
        }

        private void Call(Func<int> function, Receiver receiver = null) =>
            Calls.Make(_gate, function, () => Native.llama_onnx_session_error(_handle), receiver);
    }
}
