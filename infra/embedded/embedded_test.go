package embedded

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestADataDirectoryHasOneOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	if _, err := ReadRuntime(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("before the first demo: %v", err)
	}
	other, _ := startChild(t, "lock", dir)
	_, err := Lock(dir)
	var inUse *InUseError
	if !errors.As(err, &inUse) || inUse.Owner.PID != other.Process.Pid {
		t.Fatalf("the lock is held by process %d, the error is: %v", other.Process.Pid, err)
	}
	for _, part := range []string{dir, strconv.Itoa(other.Process.Pid), "127.0.0.1:8080"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
	r, err := ReadRuntime(dir)
	if err != nil || r.PID != other.Process.Pid || r.Brokers[0] != "127.0.0.1:9092" || r.Started.IsZero() {
		t.Errorf("the demo is found as %+v, %v", r, err)
	}
	if info, err := os.Stat(filepath.Join(dir, runtimeFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}

	_ = other.Process.Kill()
	_ = other.Wait()
	if _, err := ReadRuntime(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after a kill: %v", err)
	}
	o, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadRuntime(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("of a demo that is starting: %v", err)
	}
	if _, err := Lock(dir); !errors.As(err, &inUse) || inUse.Owner.PID != os.Getpid() {
		t.Errorf("a second lock: %v", err)
	}
	if err := o.Release(); err != nil {
		t.Error(err)
	}
	again, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Release(); err != nil {
		t.Error(err)
	}
}
