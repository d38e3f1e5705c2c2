// llama_onnx.h in C#: its functions, structures and handles. A test compares this file with the header.
using System;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;

namespace LlamaOnnx
{
    /// <summary>An opened package. A call that is in progress keeps it open.</summary>
    internal sealed class ModelHandle : SafeHandle
    {
        public ModelHandle() : base(IntPtr.Zero, true) { }

        public override bool IsInvalid => handle == IntPtr.Zero;

        protected override bool ReleaseHandle()
        {
            Native.llama_onnx_close(handle);
            return true;
        }
    }

    internal sealed class SessionHandle : SafeHandle
    {
        public SessionHandle() : base(IntPtr.Zero, true) { }

        public override bool IsInvalid => handle == IntPtr.Zero;

        protected override bool ReleaseHandle()
        {
            Native.llama_onnx_session_close(handle);
            return true;
        }
    }

    internal static class Native
    {
        internal const string Library = "llama_onnx";
        internal const int LLAMA_ONNX_OK = 0;
        internal const int LLAMA_ONNX_FAILED = 1;
        internal const int LLAMA_ONNX_CANCELLED = 2;
        internal const int LLAMA_ONNX_BUSY = 3;

        [StructLayout(LayoutKind.Sequential)]
        internal struct llama_onnx_options
        {
            public IntPtr libraries;
            public IntPtr provider;
            public int check_hashes;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct llama_onnx_session_options
        {
            public UIntPtr size;
            public UIntPtr max_tokens;
            public IntPtr adapter;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct llama_onnx_sampling
        {
            public UIntPtr size;
            public int max_new_tokens;
            public double temperature;
            public int top_k;
            public double top_p;
            public double min_p;
            public double repetition_penalty;
            public int no_repeat_ngram_size;
            public long seed;
            public IntPtr stop;
            public UIntPtr stop_count;
            public IntPtr guide;
            public IntPtr guide_kind;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct llama_onnx_stats
        {
            public UIntPtr size;
            public UIntPtr tokens;
            public UIntPtr prompt_tokens;
            public UIntPtr cached_tokens;
            public UIntPtr generated_tokens;
            public double prompt_seconds;
            public double first_token_seconds;
            public double answer_seconds;
            public double tokens_per_second;
            public int finish;
        }

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate int llama_onnx_callback(IntPtr text, IntPtr user);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_open(
            byte[] package, ref llama_onnx_options options, out ModelHandle model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_verify(
            byte[] package, ref llama_onnx_options options, llama_onnx_callback report, IntPtr user,
            out ModelHandle model);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_generate(
            ModelHandle self, byte[] prompt, int max_new_tokens, llama_onnx_callback callback,
            IntPtr user);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_chat(
            ModelHandle self, byte[] messages, int max_new_tokens, llama_onnx_callback callback,
            IntPtr user);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_generate_ids(
            ModelHandle self, int[] prompt, UIntPtr prompt_count, [Out] int[] ids,
            ref UIntPtr count);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern void llama_onnx_cancel(ModelHandle self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern void llama_onnx_close(IntPtr self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_error(ModelHandle self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_tokenizer(ModelHandle self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_encode(
            ModelHandle self, byte[] text, UIntPtr length, int special, [Out] int[] ids,
            ref UIntPtr count);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_decode(
            ModelHandle self, int[] ids, UIntPtr count, [Out] byte[] text, ref UIntPtr size);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_provider(ModelHandle self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_provider_reason(ModelHandle self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_sampling_defaults(
            ModelHandle model, out llama_onnx_sampling sampling, UIntPtr size);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_open(
            ModelHandle model, ref llama_onnx_session_options options, out SessionHandle session);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_append_text(
            SessionHandle self, byte[] text, UIntPtr length);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_append_ids(
            SessionHandle self, int[] ids, UIntPtr count);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_append_messages(
            SessionHandle self, byte[] messages);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_generate(
            SessionHandle self, ref llama_onnx_sampling sampling, llama_onnx_callback callback,
            IntPtr user);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_rewind(SessionHandle self, UIntPtr position);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_ids(
            SessionHandle self, [Out] int[] ids, ref UIntPtr count);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_save(SessionHandle self, byte[] path);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_load(SessionHandle self, byte[] path);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern int llama_onnx_session_stats(
            SessionHandle self, ref llama_onnx_stats stats, UIntPtr size);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern void llama_onnx_session_cancel(SessionHandle self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern void llama_onnx_session_close(IntPtr self);

        [DllImport(Library, CallingConvention = CallingConvention.Cdecl)]
        internal static extern IntPtr llama_onnx_session_error(SessionHandle self);
    }

    /// <summary>.NET Core finds the library by itself. .NET Framework, Mono, and a package that was
    /// unpacked by hand need help: once a library is loaded by its path, its name stands for it.
    /// </summary>
    internal static class Finder
    {
        [DllImport("kernel32", CharSet = CharSet.Unicode)]
        private static extern IntPtr LoadLibraryExW(string name, IntPtr file, int flags);

        [DllImport("libdl.so.2")]
        private static extern IntPtr dlopen(byte[] name, int flags);

        static Finder()
        {
            var windows = Path.DirectorySeparatorChar == '\\';
            var name = windows ? "llama_onnx.dll" : "libllama_onnx.so";
            var native = Path.Combine("runtimes", windows ? "win-x64" : "linux-x64", "native");
            var start = AppDomain.CurrentDomain.BaseDirectory;
            var here = Path.GetDirectoryName(typeof(Native).Assembly.Location) ?? "";
            var unpacked = Path.Combine(here, "..", "..", native);
            foreach (var folder in new[]
                     {
                         start, Path.Combine(start, native), here, Path.Combine(here, native), unpacked,
                     })
            {
                var file = Path.GetFullPath(Path.Combine(folder, name));
                if (!File.Exists(file)) continue;
                const int besideItselfAndSystem = 0x900, now = 2;
                if (windows) LoadLibraryExW(file, IntPtr.Zero, besideItselfAndSystem);
                else dlopen(Strings.Bytes(file, nameof(file)), now);
                return;
            }
        }

        /// <summary>Must be called before a method that calls the library: Mono looks for a function
        /// when it compiles its caller.</summary>
        internal static void Run() { }
    }

    /// <summary>Strings in the UTF-8 that the C library takes.</summary>
    internal static class Strings
    {
        private static readonly UTF8Encoding Strict = new UTF8Encoding(false, true);

        /// <summary>Text without a NUL at the end.</summary>
        internal static byte[] Utf8(string text, string name)
        {
            if (text == null) throw new ArgumentNullException(name);
            try
            {
                return Strict.GetBytes(text);
            }
            catch (EncoderFallbackException error)
            {
                throw new ArgumentException(
                    $"the text has half of a surrogate pair at {error.Index}.", name);
            }
        }

        /// <summary>Text with a NUL at the end, which it must not contain.</summary>
        internal static byte[] Bytes(string text, string name)
        {
            var bytes = Utf8(text, name);
            if (Array.IndexOf(bytes, (byte)0) >= 0)
                throw new ArgumentException("the text has a NUL.", name);
            Array.Resize(ref bytes, bytes.Length + 1);
            return bytes;
        }

        internal static string Text(IntPtr text)
        {
            if (text == IntPtr.Zero) return "";
            var length = 0;
            while (Marshal.ReadByte(text, length) != 0) length++;
            var bytes = new byte[length];
            Marshal.Copy(text, bytes, 0, length);
            return Encoding.UTF8.GetString(bytes);
        }
    }
}
