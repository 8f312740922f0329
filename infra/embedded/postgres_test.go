package embedded

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

// TestMain lets a test run part of itself in a process of its own, to kill it.
func TestMain(m *testing.M) {
	if role := os.Getenv("WHARF_TEST_CHILD"); role != "" {
		child(role, os.Getenv("WHARF_TEST_DIR"))
		return
	}
	// Sarama's metrics have a goroutine that never ends.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/rcrowley/go-metrics.(*meterArbiter).tick"))
}

func child(role, dir string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	switch role {
	case "postgres":
		var p *Postgres
		if p, err = StartPostgres(context.Background(), dir, log); err == nil {
			fmt.Println(p.URL(), p.server.Process.Pid)
			select {}
		}
	case "broker":
		var b *Broker
		if b, err = StartBroker(context.Background(), dir, log); err == nil {
			fmt.Println(b.Addrs()[0])
			select {}
		}
	case "lock":
		var o *Owner
		if o, err = Lock(dir); err == nil {
			err = o.Publish(Runtime{Addr: "127.0.0.1:8080", Brokers: []string{"127.0.0.1:9092"}})
		}
		if err == nil {
			fmt.Println("locked")
			select {}
		}
	}
	fmt.Println("error:", err)
}

// startChild runs this test binary again in the role and returns its first line of output.
func startChild(t *testing.T, role, dir string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "WHARF_TEST_CHILD="+role, "WHARF_TEST_DIR="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.HasPrefix(line, "error:") {
		t.Fatalf("the child said %q (%v)", line, err)
	}
	return cmd, strings.TrimSpace(line)
}

// reachableDir is a temporary directory that "nobody" can reach, unlike t.TempDir.
func reachableDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "wharf-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func startTestPostgres(t *testing.T, dir string) *Postgres {
	t.Helper()
	p, err := StartPostgres(t.Context(), dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func query(t *testing.T, url, sql string) (value int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if strings.HasPrefix(sql, "SELECT") {
		err = conn.QueryRow(t.Context(), sql).Scan(&value)
	} else {
		_, err = conn.Exec(t.Context(), sql)
	}
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

func TestPostgresKeepsItsDataItsPasswordAndItsPort(t *testing.T) {
	t.Parallel()
	dir := reachableDir(t)
	p := startTestPostgres(t, dir)
	query(t, p.URL(), "CREATE TABLE kept AS SELECT 42 AS answer")
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if info, err := os.Stat(filepath.Join(dir, clusterFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file with the password: %v, %v", info, err)
	}
	// A start that was killed half way has left a cluster without a name.
	if err := os.Mkdir(filepath.Join(dir, "postgres-half"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+"-moved"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir + "-moved") })
	port := p.Port()
	p = startTestPostgres(t, dir+"-moved")
	if p.Port() != port {
		t.Errorf("the port is %d now, and was %d", p.Port(), port)
	}
	if got := query(t, p.URL(), "SELECT answer FROM kept"); got != 42 {
		t.Errorf("the answer is %d now", got)
	}
	wrong := strings.Replace(p.URL(), "wharf:", "wharf:x", 1)
	if conn, err := pgx.Connect(t.Context(), wrong); err == nil {
		conn.Close(t.Context())
		t.Error("it takes any password")
	}
}

func TestPostgresIsStoppedWhenItsOwnerIsKilled(t *testing.T) {
	t.Parallel()
	dir := reachableDir(t)
	cmd, line := startChild(t, "postgres", dir)
	var url string
	var pid int
	if _, err := fmt.Sscan(line, &url, &pid); err != nil {
		t.Fatal(err)
	}
	query(t, url, "CREATE TABLE kept AS SELECT 42 AS answer")
	// What a Ctrl-C reaches is the terminal's process group.
	group, err1 := syscall.Getpgid(cmd.Process.Pid)
	own, err2 := syscall.Getpgid(pid)
	if err1 != nil || err2 != nil || group == own {
		t.Errorf("a Ctrl-C would stop the server: %v, %v", err1, err2)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	p := startTestPostgres(t, dir) // at once, while the old one may still be ending
	if got := query(t, p.URL(), "SELECT answer FROM kept"); got != 42 {
		t.Errorf("the answer is %d now", got)
	}
	data := p.server.Args[2]
	if servesCluster(t.Context(), pid, data) {
		t.Error("the old server still runs")
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}

	// It also ends when nobody comes after.
	cmd, line = startChild(t, "postgres", dir)
	if _, err := fmt.Sscan(line, &url, &pid); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for end := time.Now().Add(20 * time.Second); servesCluster(t.Context(), pid, data); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the server outlives its owner")
		}
	}
}

func TestPostgresCopesWithWhatAKillLeaves(t *testing.T) {
	t.Parallel()
	dir := reachableDir(t)
	p := startTestPostgres(t, dir)
	data := p.server.Args[2]
	start := func() *Postgres { return startTestPostgres(t, dir) } // and stop it after all parts

	t.Run("a dead server's pid file", func(t *testing.T) {
		if err := p.server.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-p.Done()
		if _, err := os.Stat(filepath.Join(data, "postmaster.pid")); err != nil {
			t.Fatalf("nothing was left: %v", err)
		}
		p = start()
	})
	t.Run("a pid that is another program's now", func(t *testing.T) {
		pidfile := filepath.Join(data, "postmaster.pid")
		content, err := os.ReadFile(pidfile)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
		other := exec.Command("sleep", "60")
		if err := other.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = other.Process.Kill()
			_ = other.Wait()
			if by := other.ProcessState.Sys().(syscall.WaitStatus).Signal(); by != syscall.SIGKILL {
				t.Errorf("an innocent process was stopped: %v", by)
			}
		}()
		_, rest, _ := strings.Cut(string(content), "\n")
		if err := os.WriteFile(pidfile, []byte(strconv.Itoa(other.Process.Pid)+"\n"+rest), 0o600); err != nil {
			t.Fatal(err)
		}
		p = start()
	})
	t.Run("a server that still runs", func(t *testing.T) {
		again := start()
		select {
		case <-p.Done():
		case <-time.After(10 * time.Second):
			t.Error("two servers on one cluster")
		}
		query(t, again.URL(), "SELECT 1")
	})
}

// Root's data directory may be closed to the user that the server runs as.
func TestPostgresFindsAPlaceThatItCanReach(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root runs the server as another user")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p := startTestPostgres(t, dir)
	query(t, p.URL(), "CREATE TABLE kept AS SELECT 42 AS answer")
	var c cluster
	if err := readJSON(filepath.Join(dir, clusterFile), &c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(c.Home) })
	if !filepath.IsAbs(c.Home) {
		t.Errorf("the cluster is in %s", c.Home)
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	p = startTestPostgres(t, dir)
	if got := query(t, p.URL(), "SELECT answer FROM kept"); got != 42 {
		t.Errorf("the answer is %d now", got)
	}
}

func TestPostgresSaysWhyItDoesNotStart(t *testing.T) {
	t.Parallel()
	dir := reachableDir(t)
	p := startTestPostgres(t, dir)
	data := p.server.Args[2]
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "postgresql.conf"), []byte("nonsense = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := StartPostgres(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("the error is: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := StartPostgres(ctx, reachableDir(t), slog.New(slog.DiscardHandler)); !errors.Is(err, context.Canceled) {
		t.Errorf("after the caller gave up: %v", err)
	}
}

// A session at a long query does not notice that its server was killed, and is not waited for; the log from before the start is
// kept.
func TestAPostgresThatWasKilledDuringALongQueryStartsAgain(t *testing.T) {
	dir := reachableDir(t)
	p := startTestPostgres(t, dir)
	conn, err := pgx.Connect(t.Context(), p.URL())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "DO $$ BEGIN RAISE WARNING 'the last words'; END $$"); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = conn.Exec(t.Context(), "SELECT count(*) FROM generate_series(1, 1e9::bigint) a") // it reads nothing from its client
	}()
	watch, err := pgx.Connect(t.Context(), p.URL())
	if err != nil {
		t.Fatal(err)
	}
	for active := 0; active == 0; {
		const busy = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE '%generate_series%'"
		if err := watch.QueryRow(t.Context(), busy).Scan(&active); err != nil {
			t.Fatal(err)
		}
	}
	_ = syscall.Kill(p.PID(), syscall.SIGKILL)
	<-p.Done()
	again, err := StartPostgres(t.Context(), dir, slog.New(slog.DiscardHandler), Port(p.Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Stop() }()
	if again.URL() != p.URL() {
		t.Errorf("it is at %s now, and was at %s", again.URL(), p.URL())
	}
	<-ended
	if old, _ := os.ReadFile(filepath.Join(dir, logFile+".old")); !strings.Contains(string(old), "the last words") {
		t.Errorf("%s.old holds %q", logFile, old)
	}
}
