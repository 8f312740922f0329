// Package embedded answers the question "what does Wharf run on when nothing is installed?": a durable broker that
// speaks Kafka's protocol, and a real Postgres, both kept in one data directory that a kill -9 at any moment leaves
// usable.
//
// Read this file first: who owns the data directory, and how a second terminal finds the demo that runs in it. Then
// broker.go with recover.go (what a kill leaves of the log), and postgres.go with binaries.go (where the Postgres
// programs come from). Package pgtest gives tests a database.
package embedded

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	lockFile    = "lock"
	runtimeFile = "runtime.json"
)

// ErrNotRunning says that no demo runs in the data directory.
var ErrNotRunning = errors.New("no demo is running there")

// Runtime is where the parts of a running demo are to be found. Provider is the payment provider's URL.
type Runtime struct {
	PID         int       `json:"pid"`
	Started     time.Time `json:"started"`
	Addr        string    `json:"addr,omitempty"`
	Brokers     []string  `json:"brokers,omitempty"`
	DatabaseURL string    `json:"database_url,omitempty"`
	Provider    string    `json:"provider,omitempty"`
}

// InUseError says that another process owns the data directory. Only its PID is known (0: not even that) while the
// owner is still starting.
type InUseError struct {
	Dir   string
	Owner Runtime
}

// Error names the owner.
func (e *InUseError) Error() string {
	if e.Owner.PID == 0 {
		return fmt.Sprintf("the data directory %s is in use by another process", e.Dir)
	}
	at := "still starting"
	if e.Owner.Addr != "" {
		at = "at " + e.Owner.Addr
	}
	return fmt.Sprintf("the data directory %s is in use by process %d (%s, since %s)", e.Dir, e.Owner.PID, at,
		e.Owner.Started.Local().Format(time.DateTime))
}

// Owner is the hold of this process on a data directory.
type Owner struct {
	dir  string
	me   Runtime
	file *os.File
}

// Lock takes the data directory, which it creates if needed, for this process alone. It fails with an *InUseError when
// another process holds it. The hold is a lock of the operating system, so it ends with the process, however that ends.
func Lock(dir string) (*Owner, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("create the data directory: %w", err)
	}
	path := filepath.Join(dir, lockFile)
	if err := sameUser(path); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	// ReadRuntime tries the lock for a moment too; an owner keeps it, so a few tries tell the two apart.
	err = flock(file, syscall.LOCK_EX)
	for try := 0; errors.Is(err, syscall.EWOULDBLOCK) && try < 5; try++ {
		time.Sleep(20 * time.Millisecond)
		err = flock(file, syscall.LOCK_EX)
	}
	if err != nil {
		_ = file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, &InUseError{Dir: dir, Owner: whoOwns(dir)}
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	o := &Owner{dir: dir, me: Runtime{PID: os.Getpid(), Started: time.Now().UTC()}, file: file}
	// What a killed owner left there is no longer true.
	if err := errors.Join(removeIfThere(o.runtimePath()), writeJSON(path+".owner", o.me)); err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("take over the data directory: %w", err)
	}
	return o, nil
}

// sameUser refuses to work as root on what another user has made, who could not go on with it afterwards.
func sameUser(path string) error {
	info, err := os.Stat(path)
	if err != nil || os.Geteuid() != 0 {
		return nil
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 {
		return fmt.Errorf("the data directory %s is user %d's: run as that user, or choose another one",
			filepath.Dir(path), stat.Uid)
	}
	return nil
}

// Publish tells other terminals where the parts of the demo are. PID and Started are filled in.
func (o *Owner) Publish(r Runtime) error {
	r.PID, r.Started = o.me.PID, o.me.Started
	if err := writeJSON(o.runtimePath(), r); err != nil {
		return fmt.Errorf("publish the demo's addresses: %w", err)
	}
	return nil
}

// Release gives the data directory up, after everything in it has been closed.
func (o *Owner) Release() error {
	err := removeIfThere(o.runtimePath())
	return errors.Join(err, o.file.Close())
}

func (o *Owner) runtimePath() string { return filepath.Join(o.dir, runtimeFile) }

// ReadRuntime finds the demo that runs in the data directory. Without one the error is ErrNotRunning (see errors.Is),
// and it says what to do.
func ReadRuntime(dir string) (Runtime, error) {
	notRunning := func(why string) (Runtime, error) {
		return Runtime{}, fmt.Errorf("%s: %w (%s): start one with `wharf demo --data-dir %s`, or name the addresses",
			dir, ErrNotRunning, why, dir)
	}
	file, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return notRunning("no demo has run there yet")
	case err != nil:
		return Runtime{}, fmt.Errorf("look for a demo: %w", err)
	}
	defer file.Close()
	if err := flock(file, syscall.LOCK_SH); err == nil {
		return notRunning("it has ended")
	} else if !errors.Is(err, syscall.EWOULDBLOCK) {
		return Runtime{}, fmt.Errorf("look for a demo in %s: %w", dir, err)
	}
	var r Runtime
	err = readJSON(filepath.Join(dir, runtimeFile), &r)
	if errors.Is(err, fs.ErrNotExist) {
		return notRunning("it is still starting")
	}
	return r, err
}

// whoOwns is what the owner tells of itself, as far as it has got.
func whoOwns(dir string) (r Runtime) {
	if readJSON(filepath.Join(dir, runtimeFile), &r) != nil {
		_ = readJSON(filepath.Join(dir, lockFile+".owner"), &r)
	}
	return r
}

func flock(f *os.File, how int) error {
	for {
		if err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// writeJSON replaces the file in one step: a reader, or a start after a crash, sees the old one or the new one whole.
// The file is this user's alone, for it may hold a password.
func writeJSON(path string, v any) (err error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
