// Generates text with a llama-onnx package, piece by piece, without blocking the calling thread.
//
//     using var model = await Model.OpenAsync(package);
//     await foreach (var piece in model.ChatAsync(messages, cancellationToken: stop.Token))
//         Answer.Text += piece;   // in WinUI and WPF this runs in the UI thread
//
// Needs C# 8 and .NET Core 3.1 or later, which look for llama_onnx.dll beside the program first.
#nullable enable
using System;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;

namespace LlamaOnnx
{
    /// <summary>A failure, with the message of llama_onnx_error().</summary>
    public sealed class ModelException : Exception
    {
        public ModelException(string message) : base(message) { }
    }

    /// <summary>One message of a conversation; the role is system, user or assistant.</summary>
    public sealed class Message
    {
        public string Role { get; }
        public string Content { get; }

        public Message(string role, string content)
        {
            Role = role;
            Content = content;
        }
    }

    /// <summary>An opened package. It generates one answer at a time.</summary>
    public sealed class Model : IDisposable
    {
        private readonly SemaphoreSlim _free = new SemaphoreSlim(1, 1);
        private IntPtr _handle;

        /// <summary>The provider that runs the model: "DirectML" or "CPU".</summary>
        public string Provider { get; }

        /// <summary>Why that provider was chosen, as a sentence.</summary>
        public string ProviderReason { get; }

        private Model(IntPtr handle)
        {
            _handle = handle;
            Provider = Native.Text(Native.llama_onnx_provider(handle));
            ProviderReason = Native.Text(Native.llama_onnx_provider_reason(handle));
        }

        /// <summary>Opens a package; `provider` is auto, cpu or directml.</summary>
        /// <exception cref="ModelException">The package cannot be opened.</exception>
        public static Task<Model> OpenAsync(
            string package, string provider = "auto", bool checkHashes = false) =>
            Task.Run(() => Open(package, provider, checkHashes));

        private static Model Open(string package, string provider, bool checkHashes)
        {
            var name = Marshal.StringToCoTaskMemUTF8(provider);
            try
            {
                var options = new Native.Options
                {
                    Provider = name,
                    CheckHashes = checkHashes ? 1 : 0,
                };
                var status = Native.llama_onnx_open(Native.Bytes(package), ref options, out var handle);
                if (status == Native.Ok) return new Model(handle);
                var error = Native.Text(Native.llama_onnx_error(handle));
                Native.llama_onnx_close(handle);
                throw new ModelException(error);
            }
            finally
            {
                Marshal.FreeCoTaskMem(name);
            }
        }

        /// <summary>Continues a prompt.</summary>
        public IAsyncEnumerable<string> GenerateAsync(
            string prompt, int maxNewTokens = 256, CancellationToken cancellationToken = default) =>
            StreamAsync(Native.llama_onnx_generate, prompt, maxNewTokens, cancellationToken);

        /// <summary>Answers the last message.</summary>
        public IAsyncEnumerable<string> ChatAsync(
            IEnumerable<Message> messages, int maxNewTokens = 256,
            CancellationToken cancellationToken = default)
        {
            var list = messages.Select(m => new Dictionary<string, string>
            {
                ["role"] = m.Role,
                ["content"] = m.Content,
            });
            var json = JsonSerializer.Serialize(list);
            return StreamAsync(Native.llama_onnx_chat, json, maxNewTokens, cancellationToken);
        }

        // The native call returns at the end of the answer, so it runs in a pool thread, which passes
        // the pieces through a queue.
        private async IAsyncEnumerable<string> StreamAsync(
            Native.Generate generate, string text, int maxNewTokens,
            [EnumeratorCancellation] CancellationToken cancellationToken)
        {
            await _free.WaitAsync(cancellationToken);
            var pieces = new ConcurrentQueue<string>();
            using var arrived = new SemaphoreSlim(0);
            using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
            int Receive(IntPtr piece, IntPtr user)
            {
                pieces.Enqueue(Native.Text(piece));
                arrived.Release();
                return stop.IsCancellationRequested ? 1 : 0;
            }
            Native.Callback callback = Receive; // keeps it from being garbage-collected
            var answer = Task.Run(() =>
            {
                var status =
                    generate(_handle, Native.Bytes(text), maxNewTokens, callback, IntPtr.Zero);
                arrived.Release();
                return status;
            });
            try
            {
                using var registration = stop.Token.Register(() => Native.llama_onnx_cancel(_handle));
                while (true)
                {
                    await arrived.WaitAsync(CancellationToken.None);
                    if (cancellationToken.IsCancellationRequested) break;
                    if (!pieces.TryDequeue(out var piece)) break;
                    yield return piece;
                }
                var result = await answer;
                cancellationToken.ThrowIfCancellationRequested();
                if (result == Native.Failed)
                    throw new ModelException(Native.Text(Native.llama_onnx_error(_handle)));
            }
            finally
            {
                stop.Cancel(); // the reader may have stopped early
                await answer;
                GC.KeepAlive(callback);
                _free.Release();
            }
        }

        /// <summary>Waits for an answer in progress, then frees the model.</summary>
        public void Dispose()
        {
            if (_handle == IntPtr.Zero) return;
            Native.llama_onnx_cancel(_handle);
            _free.Wait();
            Native.llama_onnx_close(_handle);
            _handle = IntPtr.Zero;
            _free.Release();
        }
    }

    internal static class Native
    {
        internal const int Ok = 0, Failed = 1;
        private const string Library = "llama_onnx";

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate int Callback(IntPtr text, IntPtr user);

        internal delegate int Generate(
            IntPtr model, byte[] text, int maxNewTokens, Callback callback, IntPtr user);

        [StructLayout(LayoutKind.Sequential)]
        internal struct Options
        {
            public IntPtr Libraries;
            public IntPtr Provider;
            public int CheckHashes;
        }

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_open(
            byte[] package, ref Options options, out IntPtr model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_generate(
            IntPtr model, byte[] prompt, int maxNewTokens, Callback callback, IntPtr user);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_chat(
            IntPtr model, byte[] messages, int maxNewTokens, Callback callback, IntPtr user);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern void llama_onnx_cancel(IntPtr model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern void llama_onnx_close(IntPtr model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_error(IntPtr model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_provider(IntPtr model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_provider_reason(IntPtr model);

        internal static byte[] Bytes(string text) => Encoding.UTF8.GetBytes(text + "\0");

        internal static string Text(IntPtr text) => Marshal.PtrToStringUTF8(text) ?? "";
    }
}
