// dotnet run -- PACKAGE             chats with a package
// dotnet run -- PACKAGE "A prompt"  continues the prompt and exits
using System;
using System.Collections.Generic;
using System.IO;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using LlamaOnnx;

internal static class Program
{
    private static async Task<int> Main(string[] arguments)
    {
        UseUtf8();
        if (arguments.Length < 1)
        {
            Console.Error.WriteLine("Usage: LlamaOnnxChat PACKAGE [PROMPT]");
            return 2;
        }
        try
        {
            using var model = Model.Open(arguments[0], new ModelOptions { CheckHashes = true });
            Console.Error.WriteLine($"Runs on {model.Provider}. {model.ProviderReason}");
            using var session = model.OpenSession();
            var how = model.DefaultSampling();
            how.MaxNewTokens = 2048;
            if (arguments.Length > 1)
            {
                session.AppendText(arguments[1]);
                await Print(session.StreamAsync(how));
            }
            else await Chat(session, how);
            return 0;
        }
        catch (ModelException error)
        {
            Console.Error.WriteLine($"Error: {error.Message}");
            return 1;
        }
    }

    // Only a console's encoding can be set; files and pipes need new streams.
    private static void UseUtf8()
    {
        var utf8 = new UTF8Encoding(false);
        if (!Console.IsOutputRedirected)
            Console.OutputEncoding = utf8;
        else
            Console.SetOut(new StreamWriter(Console.OpenStandardOutput(), utf8) { AutoFlush = true });
        if (Console.IsErrorRedirected)
            Console.SetError(new StreamWriter(Console.OpenStandardError(), utf8) { AutoFlush = true });
        if (Console.IsInputRedirected)
            Console.SetIn(new StreamReader(Console.OpenStandardInput(), utf8));
    }

    // A console obeys control characters; in a file or a pipe the text is data.
    private static string Shown(string text)
    {
        if (Console.IsOutputRedirected) return text;
        var shown = new StringBuilder(text);
        for (var i = 0; i < shown.Length; i++)
            if (char.IsControl(shown[i]) && shown[i] != '\n' && shown[i] != '\t') shown[i] = '?';
        return shown.ToString();
    }

    private static async Task Chat(Session session, Sampling how)
    {
        while (true)
        {
            Console.Write("> ");
            var line = Console.ReadLine();
            if (string.IsNullOrEmpty(line)) return;
            session.Append(new Message("user", line));
            using var stop = new CancellationTokenSource();
            void Cancel(object sender, ConsoleCancelEventArgs e)
            {
                e.Cancel = true;
                stop.Cancel();
            }
            Console.CancelKeyPress += Cancel; // Ctrl+C stops the answer, not the program
            try
            {
                await Print(session.StreamAsync(how, stop.Token));
            }
            catch (OperationCanceledException)
            {
                Console.WriteLine();
            }
            Console.CancelKeyPress -= Cancel;
        }
    }

    private static async Task Print(IAsyncEnumerable<string> pieces)
    {
        await foreach (var piece in pieces) Console.Write(Shown(piece));
        Console.WriteLine();
    }
}
