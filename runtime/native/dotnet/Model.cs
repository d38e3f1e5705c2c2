// A llama-onnx package in .NET: netstandard2.0, so .NET Framework 4.7.2, .NET Core, .NET and Mono.
//
//     using (var model = Model.Open("package"))
//     using (var session = model.OpenSession())
//     {
//         session.Append(new Message("user", "Name a color."));
//         foreach (var piece in session.Stream()) Console.Write(piece);
//     }
//
// A model and each of its sessions do one thing at a time: a second call throws a ModelException with
// IsBusy. Sessions of one model may run in different threads at once. Dispose may be called at any
// time, from any thread: it cancels what is in progress.
using System;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Text;
using System.Threading;

namespace LlamaOnnx
{
    /// <summary>An opened package.</summary>
    public sealed class Model : IDisposable
    {
        private readonly object _gate = new object();
        private readonly ModelHandle _handle;

        /// <summary>The provider that runs the model: "DirectML" or "CPU".</summary>
        public string Provider { get; }

        /// <summary>Why that provider was chosen, as a sentence.</summary>
        public string ProviderReason { get; }

        /// <summary>"" if texts become the tokens of the model's training; otherwise the reason why
        /// they may not.</summary>
        public string TokenizerNote { get; }

        private Model(ModelHandle handle)
        {
            _handle = handle;
            Provider = Strings.Text(Native.llama_onnx_provider(handle));
            ProviderReason = Strings.Text(Native.llama_onnx_provider_reason(handle));
            TokenizerNote = Strings.Text(Native.llama_onnx_tokenizer(handle));
        }

        /// <summary>Opens the package in a folder.</summary>
        /// <exception cref="ModelException">The package cannot be opened.</exception>
        public static Model Open(string package, ModelOptions options = null)
        {
            var path = Strings.Bytes(package, nameof(package));
            Finder.Run();
            return OpenFound(path, options);
        }

        [MethodImpl(MethodImplOptions.NoInlining)]
        private static Model OpenFound(byte[] path, ModelOptions options)
        {
            using (var memory = new Memory())
            {
                var c = ToNative(options, memory);
                return Opened(Native.llama_onnx_open(path, ref c, out var handle), handle);
            }
        }

        /// <summary>Compares every file with the manifest, opens the package and replays its
        /// certificate; `report` gets a line for each check.</summary>
        /// <exception cref="ModelException">A check failed.</exception>
        public static Model Verify(
            string package, ModelOptions options = null, Action<string> report = null)
        {
            var path = Strings.Bytes(package, nameof(package));
            Finder.Run();
            return VerifyFound(path, options, report);
        }

        [MethodImpl(MethodImplOptions.NoInlining)]
        private static Model VerifyFound(byte[] path, ModelOptions options, Action<string> report)
        {
            var lines = new Receiver(line =>
            {
                report?.Invoke(line);
                return true;
            });
            using (var memory = new Memory())
            {
                var c = ToNative(options, memory);
                var status =
                    Native.llama_onnx_verify(path, ref c, lines.Callback, IntPtr.Zero, out var handle);
                GC.KeepAlive(lines);
                var model = Opened(status, handle);
                try
                {
                    lines.Rethrow();
                    return model;
                }
                catch
                {
                    model.Dispose();
                    throw;
                }
            }
        }

        private static Native.llama_onnx_options ToNative(ModelOptions options, Memory memory) =>
            new Native.llama_onnx_options
            {
                libraries = memory.Add(options?.Libraries, nameof(ModelOptions.Libraries)),
                provider = memory.Add(options?.Provider, nameof(ModelOptions.Provider)),
                check_hashes = options != null && options.CheckHashes ? 1 : 0,
            };

        private static Model Opened(int status, ModelHandle handle)
        {
            if (status == Native.LLAMA_ONNX_OK) return new Model(handle);
            using (handle)
                throw new ModelException(
                    handle.IsInvalid
                        ? "there is not enough memory to open the package."
                        : Strings.Text(Native.llama_onnx_error(handle)));
        }

        /// <summary>Begins an empty session of at most `maxTokens` tokens; 0: 4096, or the model's
        /// context if that is smaller. `adapter` is the name of one of the package's.</summary>
        public Session OpenSession(int maxTokens = 0, string adapter = null) =>
            new Session(this, _handle, maxTokens, adapter);

        /// <summary>Returns the sampling of the package.</summary>
        public Sampling DefaultSampling()
        {
            var status = Native.llama_onnx_sampling_defaults(
                _handle, out var c, Memory.Size<Native.llama_onnx_sampling>());
            if (status != Native.LLAMA_ONNX_OK)
                throw new ModelException("llama_onnx is another version than LlamaOnnx.dll.");
            return Sampling.From(c);
        }

        /// <summary>Continues a prompt and returns the new text.</summary>
        public string Generate(
            string prompt, int maxNewTokens = 256, Func<string, bool> onPiece = null)
        {
            var bytes = Strings.Bytes(prompt, nameof(prompt));
            return Answer(onPiece, callback => Native.llama_onnx_generate(
                _handle, bytes, maxNewTokens, callback, IntPtr.Zero));
        }

        /// <summary>Answers a conversation and returns the answer. `onPiece` gets each piece, and
        /// returns false to end the answer.</summary>
        public string Chat(
            IEnumerable<Message> messages, int maxNewTokens = 256, Func<string, bool> onPiece = null)
        {
            var bytes = Strings.Bytes(Message.Json(messages), nameof(messages));
            return Answer(onPiece, callback => Native.llama_onnx_chat(
                _handle, bytes, maxNewTokens, callback, IntPtr.Zero));
        }

        private string Answer(
            Func<string, bool> onPiece, Func<Native.llama_onnx_callback, int> generate)
        {
            var text = new StringBuilder();
            var receiver = new Receiver(piece =>
            {
                text.Append(piece);
                return onPiece == null || onPiece(piece);
            });
            Call(() => generate(receiver.Callback), receiver);
            return text.ToString();
        }

        /// <summary>Continues tokens with at most `count` tokens.</summary>
        public int[] GenerateIds(int[] prompt, int count)
        {
            if (prompt == null) throw new ArgumentNullException(nameof(prompt));
            if (count < 0) throw new ArgumentOutOfRangeException(nameof(count));
            var ids = new int[count];
            var size = (UIntPtr)(uint)count;
            Call(() => Native.llama_onnx_generate_ids(
                _handle, prompt, (UIntPtr)(uint)prompt.Length, ids, ref size));
            Array.Resize(ref ids, (int)size);
            return ids;
        }

        /// <summary>Returns the tokens of a text; `special`: with those that the vocabulary puts
        /// before it.</summary>
        public int[] Encode(string text, bool special = true)
        {
            var bytes = Strings.Utf8(text, nameof(text));
            var ids = new int[bytes.Length + 8];
            while (true)
            {
                var size = (UIntPtr)(uint)ids.Length;
                Call(() => Native.llama_onnx_encode(
                    _handle, bytes, (UIntPtr)(uint)bytes.Length, special ? 1 : 0, ids, ref size));
                var enough = (int)size <= ids.Length;
                Array.Resize(ref ids, (int)size);
                if (enough) return ids;
            }
        }

        /// <summary>Returns the text of tokens, without special tokens.</summary>
        public string Decode(int[] ids)
        {
            if (ids == null) throw new ArgumentNullException(nameof(ids));
            var text = new byte[8 * ids.Length + 64];
            while (true)
            {
                var size = (UIntPtr)(uint)text.Length;
                Call(() => Native.llama_onnx_decode(
                    _handle, ids, (UIntPtr)(uint)ids.Length, text, ref size));
                if ((int)size < text.Length) return Encoding.UTF8.GetString(text, 0, (int)size);
                text = new byte[(int)size + 1];
            }
        }

        /// <summary>Ends the answer in progress, from any thread. Not those of sessions.</summary>
        public void Cancel() => Native.llama_onnx_cancel(_handle);

        /// <summary>Cancels, and frees the model when no call and no session needs it.</summary>
        public void Dispose()
        {
            if (_handle.IsClosed) return;
            try
            {
                Cancel();
            }
            catch (ObjectDisposedException)
            {
                // another thread was faster
            }
            _handle.Dispose();
        }

        private void Call(Func<int> function, Receiver receiver = null) =>
            Calls.Make(_gate, function, () => Native.llama_onnx_error(_handle), receiver);
    }

    internal static class Calls
    {
        /// <summary>Calls the C library unless another thread does, and throws what went wrong.</summary>
        internal static void Make(
            object gate, Func<int> function, Func<IntPtr> error, Receiver receiver = null)
        {
            if (!Monitor.TryEnter(gate)) throw Busy();
            try
            {
                var status = function();
                GC.KeepAlive(receiver);
                receiver?.Rethrow();
                if (status == Native.LLAMA_ONNX_BUSY) throw Busy();
                if (status == Native.LLAMA_ONNX_FAILED)
                    throw new ModelException(Strings.Text(error()));
            }
            finally
            {
                Monitor.Exit(gate);
            }
        }

        private static ModelException Busy() =>
            new ModelException("another call is in progress: wait for it or cancel it.", true);
    }
}
