package embedded

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	clusterFile  = "postgres.json" // a cluster that is not named there does not exist
	logFile      = "postgres.log"  // since the last start; before that with .old
	databaseName = "wharf"         // of the user too

	startTimeout = 2 * time.Minute // after a crash it reads up to max_wal_size of log first
	fastTimeout  = 30 * time.Second
	killTimeout  = 5 * time.Second
	portTries    = 5
	retryPause   = 500 * time.Millisecond

	pgerrcodeInvalidPassword = "28P01"
)

// settings of every server. It holds read models and nothing else, which decides how much safety they need:
//   - fsync stays on, so that no crash, not even of the machine, damages the cluster.
//   - synchronous_commit is off: a crash may lose the last half second of commits, whole ones and in order. A read
//     model's rows and its positions are of one commit, so the projector does that half second again.
//   - nobody replicates it, and the batches are large: little in the log, few checkpoints.
//   - dynamic_shared_memory_type and unix_socket_directories keep it out of places that containers make small or
//     read-only.
var settings = []string{
	"listen_addresses=127.0.0.1",
	"unix_socket_directories=",
	"max_connections=100",
	"shared_buffers=128MB",
	"dynamic_shared_memory_type=mmap",
	"synchronous_commit=off",
	"wal_level=minimal",
	"max_wal_senders=0",
	"max_wal_size=2GB",
	"checkpoint_timeout=15min",
	"maintenance_work_mem=128MB",
	"jit=off",
	"timezone=UTC",
	"log_timezone=UTC",
	"log_min_messages=warning",
}

// Postgres is a running server of our own.
type Postgres struct {
	url       string
	port      int
	server    *exec.Cmd
	exited    chan struct{} // closed when the server is gone
	ephemeral []string      // directories to delete after it
	stop      sync.Once
	stopError error
}

// Option changes what StartPostgres does.
type Option func(*options)

type options struct {
	ephemeral bool
	port      int // 0: a free one
}

// Ephemeral is for tests: the server spares itself the waiting for the disk, and after Stop, or when this process ends,
// however it ends, the whole directory is deleted.
func Ephemeral() Option { return func(o *options) { o.ephemeral = true } }

// Port makes the server listen on this port and not on a free one, so that the clients of an earlier server find it.
func Port(port int) Option { return func(o *options) { o.port = port } }

// cluster is what the data directory remembers of its Postgres.
type cluster struct {
	Home     string `json:"home"` // relative to the data directory, if it lies in it
	Major    string `json:"major"`
	Password string `json:"password"`
	Port     int    `json:"port"` // taken again if it is free, so that clients of an earlier run find the server
}

// StartPostgres starts a Postgres server on the cluster in dir, which it makes on first use, and returns when the
// server takes connections. The first time that a user starts one, its programs are downloaded. A server that a killed
// process left running on the cluster is stopped first. The caller holds the Lock of dir.
//
// The server listens on 127.0.0.1, on the port of the time before if it is free, or that of Port, and asks for a random
// password that only dir tells. Run by root it becomes the user "nobody"; where that user cannot reach dir, the cluster lies
// elsewhere and dir says where.
//
// ctx bounds the start alone. The server is not stopped by a Ctrl-C at the terminal, only by Stop; if this process dies
// without calling it, the server ends too, in order.
func StartPostgres(ctx context.Context, dir string, log *slog.Logger, opts ...Option) (*Postgres, error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	p, err := startPostgres(ctx, dir, log, o)
	if err != nil {
		return nil, fmt.Errorf("start the embedded Postgres in %s: %w", dir, err)
	}
	return p, nil
}

func startPostgres(ctx context.Context, dir string, log *slog.Logger, o options) (*Postgres, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	as, err := serverAccount()
	if err != nil {
		return nil, err
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	programs, err := binaries(ctx, cache, log)
	if err != nil {
		return nil, err
	}
	c, err := openCluster(ctx, dir, programs, as, log, o)
	if err != nil {
		return nil, err
	}
	if err := stopLeftover(ctx, c.data(), log); err != nil {
		return nil, err
	}

	_ = os.Rename(filepath.Join(dir, logFile), filepath.Join(dir, logFile+".old"))
	began := time.Now()
	asked := o.port
	o.port = cmp.Or(asked, c.Port)
	for try := 1; ; try++ {
		p, err := c.start(ctx, dir, programs, as, log, o)
		var again bool
		switch {
		case err == nil:
			if p.port != c.Port {
				c.Port = p.port
				if err := c.write(dir); err != nil {
					return nil, errors.Join(err, p.Stop())
				}
			}
			return p, nil
		case strings.Contains(err.Error(), "could not bind"):
			log.Debug("somebody has Postgres's port")
			o.port = asked
			again = try < portTries
		case strings.Contains(err.Error(), "still in use"):
			log.Debug("sessions of a killed Postgres are still there")
			quitSessions(ctx, c.data())
			again = time.Since(began) < startTimeout
		}
		if !again || pause(ctx, retryPause) != nil {
			return nil, err
		}
	}
}

// URL is where the server is, with the password in it.
func (p *Postgres) URL() string { return p.url }

// Port is the one that the server listens on.
func (p *Postgres) Port() int { return p.port }

// PID is the server's process id. Its sessions are child processes.
func (p *Postgres) PID() int { return p.server.Process.Pid }

// Done is closed when the server has ended, because of Stop or by itself.
func (p *Postgres) Done() <-chan struct{} { return p.exited }

// Stop ends the server in order: it rolls open transactions back, closes the connections and writes everything down.
// Only if that takes too long it is killed, which the next start makes good. It may be called more than once.
func (p *Postgres) Stop() error {
	p.stop.Do(func() {
		for _, way := range []struct {
			signal syscall.Signal
			wait   time.Duration
		}{{syscall.SIGINT, fastTimeout}, {syscall.SIGQUIT, killTimeout}, {syscall.SIGKILL, killTimeout}} {
			_ = p.server.Process.Signal(way.signal)
			select {
			case <-p.exited:
				if way.signal != syscall.SIGINT {
					p.stopError = fmt.Errorf("stop Postgres: it needed a signal to end: %v", way.signal)
				}
				for _, dir := range p.ephemeral {
					p.stopError = errors.Join(p.stopError, os.RemoveAll(dir))
				}
				return
			case <-time.After(way.wait):
			}
		}
		p.stopError = errors.New("stop Postgres: it cannot be killed")
	})
	return p.stopError
}

// openCluster reads where the cluster is, or makes one. The file that names a cluster is written last, so a cluster
// that is named is whole.
func openCluster(ctx context.Context, dir, programs string, as account, log *slog.Logger, o options) (cluster, error) {
	record := filepath.Join(dir, clusterFile)
	var c cluster
	err := readJSON(record, &c)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return c, err
	}
	if err == nil {
		c.Home = absolute(dir, c.Home)
		_, err = os.Stat(filepath.Join(c.data(), "PG_VERSION"))
		if err == nil && c.Major == postgresMajor {
			return c, as.own(c.Home)
		}
		log.Warn("the Postgres cluster is gone or of another version; read models will be built anew from the log",
			"was", c.Home, "version", c.Major)
		if err := errors.Join(removeIfThere(record), os.RemoveAll(c.Home)); err != nil {
			return c, err
		}
	}
	halfMade, err := filepath.Glob(filepath.Join(dir, "postgres-*"))
	if err != nil {
		return c, err
	}
	for _, old := range halfMade {
		if err := os.RemoveAll(old); err != nil {
			return c, err
		}
	}

	began := time.Now()
	home, err := as.newHome(dir)
	if err != nil {
		return c, err
	}
	c = cluster{Home: home, Major: postgresMajor, Password: rand.Text()}
	if err := c.init(ctx, programs, as, o); err != nil {
		return c, errors.Join(err, os.RemoveAll(home))
	}
	if err := c.write(dir); err != nil {
		return c, err
	}
	log.Info("made a Postgres cluster", "in", home, "took", time.Since(began).Round(time.Millisecond))
	return c, nil
}

// write names the cluster.
func (c cluster) write(dir string) error {
	if rel, err := filepath.Rel(dir, c.Home); err == nil && filepath.IsLocal(rel) {
		c.Home = rel
	}
	return writeJSON(filepath.Join(dir, clusterFile), c)
}

func (c cluster) data() string { return filepath.Join(c.Home, "data") }

func (c cluster) init(ctx context.Context, programs string, as account, o options) error {
	pwfile := filepath.Join(c.Home, "password")
	if err := os.WriteFile(pwfile, []byte(c.Password), 0o600); err != nil {
		return err
	}
	defer os.Remove(pwfile)
	if err := as.own(pwfile); err != nil {
		return err
	}
	// The collation is by code point and built in: the same on every machine, and the fastest.
	args := []string{"--pgdata", c.data(), "--username", databaseName, "--pwfile", pwfile, "--auth", "scram-sha-256",
		"--encoding", "UTF8", "--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"}
	if o.ephemeral {
		args = append(args, "--no-sync")
	}
	cmd := as.command(ctx, filepath.Join(programs, "bin", "initdb"), c.Home, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// start runs the server on its port, or one that is free now, and waits until it takes connections.
func (c cluster) start(
	ctx context.Context, dir, programs string, as account, log *slog.Logger, o options,
) (*Postgres, error) {
	port := o.port
	if port == 0 {
		var err error
		if port, err = freePort(); err != nil {
			return nil, err
		}
	}
	// The server writes to a file and not to this process, so that it can say why it ended when this one was killed.
	said := filepath.Join(dir, logFile)
	output, err := os.Create(said)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	args := []string{"-D", c.data(), "-p", strconv.Itoa(port)}
	for _, s := range settings {
		args = append(args, "-c", s)
	}
	if o.ephemeral {
		args = append(args, "-c", "fsync=off", "-c", "full_page_writes=off")
	}
	// Not bound to ctx, which is that of the start.
	cmd := as.command(context.WithoutCancel(ctx), filepath.Join(programs, "bin", "postgres"), c.Home, args...)
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Postgres{
		url: (&url.URL{
			Scheme: "postgres", User: url.UserPassword(databaseName, c.Password),
			Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), Path: databaseName, RawQuery: "sslmode=disable",
		}).String(),
		port: port, server: cmd, exited: make(chan struct{}),
	}
	whenOrphaned := `kill -INT "$0"`
	if o.ephemeral {
		whenOrphaned = `kill -QUIT "$0"
			for try in 1 2 3 4 5 6 7 8 9; do [ -e "$1/data/postmaster.pid" ] && sleep 0.1; done; rm -rf "$1" "$2"`
	}
	guard, err := startGuard(whenOrphaned, strconv.Itoa(cmd.Process.Pid), c.Home, dir)
	if err != nil {
		log.Warn("if this process is killed, Postgres will go on until the next start", "error", err)
	}
	go p.watch(guard)

	if err := p.ready(ctx); err != nil {
		err = errors.Join(err, p.Stop())
		text, _ := os.ReadFile(said)
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(text[max(0, len(text)-2000):]))
	}
	if o.ephemeral {
		p.ephemeral = []string{c.Home, dir}
	}
	return p, nil
}

// watch waits for the end of the server.
func (p *Postgres) watch(g *guard) {
	_ = p.server.Wait()
	if g != nil {
		g.dismiss() // before somebody else gets the process id
	}
	close(p.exited)
}

// ready waits until the server takes connections, and makes the database if it is not there.
func (p *Postgres) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not ready after %v", startTimeout))
	defer cancel()
	config, err := pgx.ParseConfig(p.url)
	if err != nil {
		return err
	}
	config.Database = "postgres"
	for {
		conn, err := pgx.ConnectConfig(ctx, config)
		if err == nil {
			defer conn.Close(ctx)
			return createDatabase(ctx, conn)
		}
		var refused *pgconn.PgError
		if errors.As(err, &refused) && refused.Code == pgerrcodeInvalidPassword {
			return fmt.Errorf("the password that the data directory remembers is not the server's: %w", err)
		}
		select {
		case <-p.exited:
			return errors.New("the server ended at once")
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func createDatabase(ctx context.Context, conn *pgx.Conn) error {
	var exists bool
	err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", databaseName).Scan(&exists)
	if err == nil && !exists {
		_, err = conn.Exec(ctx, "CREATE DATABASE "+databaseName)
	}
	if err != nil {
		return fmt.Errorf("create the database: %w", err)
	}
	return nil
}

// stopLeftover stops a server that still runs on the cluster, because the process that started it was killed. What a
// dead server left (its pid file, its shared memory) Postgres clears away by itself, unless its process id now belongs
// to another program.
func stopLeftover(ctx context.Context, data string, log *slog.Logger) error {
	pidfile := filepath.Join(data, "postmaster.pid")
	content, err := os.ReadFile(pidfile)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || pid <= 1 {
		return removeIfThere(pidfile) // torn by a crash
	}
	if !servesCluster(ctx, pid, data) {
		if alive(pid) {
			return removeIfThere(pidfile)
		}
		return nil
	}
	log.Info("stopping the Postgres that a killed process left", "pid", pid)
	for _, way := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGINT, fastTimeout}, {syscall.SIGQUIT, killTimeout}} {
		if err := syscall.Kill(pid, way.signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop the Postgres that a killed process left: %w", err)
		}
		for end := time.Now().Add(way.wait); time.Now().Before(end); {
			if !servesCluster(ctx, pid, data) {
				return nil
			}
			if err := pause(ctx, 20*time.Millisecond); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("process %d serves the cluster and does not stop", pid)
}

// quitSessions ends what a killed server has left at work on the cluster: a session at a long query does not notice its
// server's death. Where there is no /proc it is waited for.
func quitSessions(ctx context.Context, data string) {
	processes, _ := os.ReadDir("/proc")
	for _, p := range processes {
		if pid, err := strconv.Atoi(p.Name()); err == nil {
			name, _ := os.ReadFile("/proc/" + p.Name() + "/comm")
			if string(name) == "postgres\n" && servesCluster(ctx, pid, data) {
				_ = syscall.Kill(pid, syscall.SIGQUIT)
			}
		}
	}
}

func alive(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

// servesCluster says whether the process is a Postgres server on the cluster: not a process that happens to have the
// same number, and not the remains of one whose parent does not care.
func servesCluster(ctx context.Context, pid int, data string) bool {
	if runtime.GOOS == "linux" {
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)) // a server works in its cluster
		return err == nil && cwd == data
	}
	out, err := exec.CommandContext(ctx, "ps", "-ww", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	return err == nil && strings.Contains(string(out), "postgres -D "+data+" ")
}

// freePort is a port that nobody listens on at the moment.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

func absolute(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// guard is a shell that does something when this process ends, however it ends: it waits at a pipe whose other end only
// this process holds.
type guard struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

func startGuard(script string, args ...string) (*guard, error) {
	cmd := exec.Command("/bin/sh", append([]string{"-c", "read -r _ || { " + script + "; } 2>/dev/null"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &guard{cmd: cmd, pipe: pipe}, nil
}

// dismiss ends the guard; it does nothing more.
func (g *guard) dismiss() {
	_, _ = g.pipe.Write([]byte("\n"))
	_ = g.cmd.Wait()
}

// account is the user that the server runs as.
type account struct {
	other    bool // than this process
	uid, gid uint32
}

// serverAccount is this user, or "nobody" for root: Postgres refuses to run as root.
func serverAccount() (account, error) {
	if os.Geteuid() != 0 {
		return account{}, nil
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		return account{}, fmt.Errorf("postgres refuses to run as root, and there is no user to run it as: %w", err)
	}
	uid, err1 := strconv.ParseInt(nobody.Uid, 10, 64) // -2 on some systems
	gid, err2 := strconv.ParseInt(nobody.Gid, 10, 64)
	return account{other: true, uid: uint32(uid), gid: uint32(gid)}, errors.Join(err1, err2)
}

// command is one that runs as the account and is out of reach of the terminal's Ctrl-C.
func (a account) command(ctx context.Context, program, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir // this process's may be closed to the account
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=" + dir, "TMPDIR=" + os.TempDir()}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a.other {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	return cmd
}

// newHome makes a directory for a cluster, in dir if the account can reach it.
func (a account) newHome(dir string) (string, error) {
	places := []string{dir}
	if a.other && !a.reaches(dir) {
		places = []string{"/var/lib/wharf", os.TempDir()}
	}
	var errs []error
	for _, place := range places {
		err := openDir(place)
		if err == nil && !a.reaches(place) {
			err = fmt.Errorf("%s is out of Postgres's reach", place)
		}
		if err == nil {
			var home string
			if home, err = os.MkdirTemp(place, "postgres-"); err == nil {
				return home, a.own(home)
			}
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("no place for the cluster: %w", errors.Join(errs...))
}

// reaches says whether the account may pass through all directories down to this one.
func (a account) reaches(dir string) bool {
	if !a.other {
		return true
	}
	dir, err := filepath.EvalSymlinks(dir)
	for ; err == nil; dir = filepath.Dir(dir) {
		var info os.FileInfo
		if info, err = os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return err == nil
		}
	}
	return false
}

// own gives a file or directory tree to the account.
func (a account) own(path string) error {
	if !a.other {
		return nil
	}
	return filepath.WalkDir(path, func(name string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Lchown(name, int(a.uid), int(a.gid))
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a server that is just ending removes files of its own
		}
		return err
	})
}
