// Uses LlamaOnnx.dll for `nox -s windows -- --csharp`, and for the tests under Mono.
//
//     Trial talk PACKAGE COUNT TEXT...     a conversation; prints what talk.c prints
//     Trial misuse PACKAGE FOLDER          what apps do wrong, and the rest; prints one fact per line
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using LlamaOnnx;

internal static class Trial
{
    private static int Main(string[] arguments)
    {
        var utf8 = new UTF8Encoding(false);
        Console.SetOut(new StreamWriter(Console.OpenStandardOutput(), utf8) { AutoFlush = true });
        if (arguments[0] == "talk")
            Talk(arguments[1], int.Parse(arguments[2]), arguments.Skip(3));
        else
            Misuse(arguments[1], arguments[2]);
        return 0;
    }

    private static void Talk(string package, int count, IEnumerable<string> texts)
    {
        using (var model = Model.Open(package, new ModelOptions { Provider = "cpu" }))
        using (var session = model.OpenSession())
        {
            var how = model.DefaultSampling();
            how.Temperature = 0;
            how.MaxNewTokens = count;
            foreach (var text in texts)
            {
                session.Append(new Message("user", text));
                foreach (var _ in session.Stream(how)) { }
                var stats = session.Stats();
                var ids = session.Ids().Skip((int)stats.PromptTokens);
                Console.WriteLine(
                    $"turn {stats.FirstTokenSeconds * 1000:0} {stats.PromptTokens} " +
                    $"{stats.CachedTokens} {string.Join(" ", ids)}");
            }
        }
    }

    private static void Say(string what, Action action)
    {
        try
        {
            action();
            Console.WriteLine($"{what}: nothing");
        }
        catch (Exception error)
        {
            Console.WriteLine($"{what}: {error.GetType().Name}: {error.Message.Split('\r', '\n')[0]}");
        }
    }

    private static void Misuse(string package, string folder)
    {
        Say("null package", () => Model.Open(null));
        Say("no package", () => Model.Open("no such folder"));
        Say("unknown provider", () => Model.Open(package, new ModelOptions { Provider = "cuda" }));
        var lines = new List<string>();
        using (Model.Verify(package, null, lines.Add)) Console.WriteLine($"verified: {lines.Count > 0}");
        Say("report throws", () => Model.Verify(package, null, _ => throw new IOException("mine")));
        var model = Model.Open(package);
        Console.WriteLine($"round trip: {model.Decode(model.Encode("the \0 日本 😀 quick")) == "the  日本 😀 quick"}");
        Console.WriteLine($"ids: {model.GenerateIds(model.Encode("the"), 5).Length}");
        Say("half a surrogate", () => model.Generate("x\ud800y"));
        Say("NUL in a prompt", () => model.Generate("x\0y"));
        Say("null message", () => model.Chat(new Message[] { null }));
        Say("unknown adapter", () => model.OpenSession(adapter: "none"));
        Say("negative length", () => model.OpenSession(-1));
        var how = model.DefaultSampling();
        how.Temperature = 0;
        how.MaxNewTokens = 40;
        UseSessions(model, how, folder);
        var stopped = model.OpenSession();
        model.Dispose();
        Say("disposed model", () => model.Generate("the"));
        Say("disposed model's session", () => model.OpenSession());
        stopped.AppendText("the");
        Say("session after its model", () => Console.Write(stopped.Ids().Length > 0 ? "" : "empty "));
        stopped.Dispose();
        stopped.Dispose();
        Say("disposed session", () => stopped.AppendText("the"));
        Say("disposed stream", () => stopped.Stream());
        stopped.Cancel();
        model.Dispose();
        Console.WriteLine("end");
    }

    private static void UseSessions(Model model, Sampling how, string folder)
    {
        using (var session = model.OpenSession())
        {
            session.AppendText("the quick");
            var start = session.Ids().Length;
            var all = session.Generate(how);
            var pieces = 0;
            session.Rewind(start);
            Say("callback throws", () => session.Generate(how, _ =>
            {
                if (++pieces == 3) throw new InvalidDataException("mine");
                return true;
            }));
            Console.WriteLine($"pieces before it: {pieces}, {session.Stats().Finish}");
            session.Rewind(start);
            Console.WriteLine($"the same after it: {session.Generate(how) == all}");
            session.Rewind(start);
            how.MaxNewTokens = 1000; // too many to be done before the reader leaves
            Console.WriteLine($"left after 2: {session.Stream(how).Take(2).Count()}, {session.Stats().Finish}");
            how.MaxNewTokens = 40;
            session.Rewind(start);
            Say("cancelled", () => CancelAfter(session, how, 3));
            session.Rewind(start);
            Say("busy", () => session.Generate(how, _ => session.Ids().Length > 0));
            session.Rewind(start);
            Say("busy in another thread", () => session.Generate(how, _ =>
            {
                Task.Run(() => session.Generate(how)).GetAwaiter().GetResult();
                return true;
            }));
            session.Rewind(start);
            how.Stop.Add(all.Substring(all.Length / 2, 2));
            var end = all.IndexOf(how.Stop[0], StringComparison.Ordinal);
            Console.WriteLine($"stop text: {session.Generate(how) == all.Substring(0, end)}, {session.Stats().Finish}");
            how.Stop[0] = null;
            Say("null stop", () => session.Generate(how));
            how.Stop.Clear();
            Say("rewound too far", () => session.Rewind(100000));
            Say("negative rewind", () => session.Rewind(-1));
            var file = Path.Combine(folder, "saved ä 日本");
            session.Save(file);
            using (var other = model.OpenSession())
            {
                other.Load(file);
                Console.WriteLine($"loaded: {other.Ids().SequenceEqual(session.Ids())}");
                Say("nothing to load", () => other.Load(Path.Combine(folder, "none")));
                Say("messages after text", () => other.Append(new Message("user", "x")));
            }
            Console.WriteLine($"two at once: {TwoAtOnce(model, how, all)}");
            Console.WriteLine($"seeded: {Seeded(model) == Seeded(model)}");
            DisposeInside(model, how);
        }
    }

    private static void CancelAfter(Session session, Sampling how, int count)
    {
        using (var stop = new CancellationTokenSource())
        {
            foreach (var piece in session.Stream(how, stop.Token))
                if (--count == 0) stop.Cancel();
        }
    }

    private static bool TwoAtOnce(Model model, Sampling how, string expected)
    {
        var answers = Enumerable.Range(0, 2).Select(_ => Task.Run(() =>
        {
            using (var session = model.OpenSession())
            {
                session.AppendText("the quick");
                return session.Generate(how);
            }
        }));
        return Task.WhenAll(answers).Result.All(answer => answer == expected);
    }

    private static string Seeded(Model model)
    {
        using (var session = model.OpenSession())
        {
            session.AppendText("the quick");
            var how = model.DefaultSampling();
            how.Temperature = 1;
            how.Seed = 7;
            how.MaxNewTokens = 20;
            return session.Generate(how);
        }
    }

    private static void DisposeInside(Model model, Sampling how)
    {
        var session = model.OpenSession();
        session.AppendText("the quick");
        var pieces = 0;
        Say("disposed by its own callback", () => session.Generate(how, _ =>
        {
            pieces++;
            session.Dispose();
            return true;
        }));
        Console.WriteLine($"pieces until then: {pieces}");
    }
}
