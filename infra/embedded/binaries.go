package embedded

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/xi2/xz"
)

// The Postgres programs are those that the embedded-postgres libraries of Java and Go use: Maven artifacts of
// https://github.com/zonkyio/embedded-postgres-binaries. The Go library cannot be asked to fetch without also
// starting a server as the current user, which fails for root, so the fetching is done here.
const (
	postgresVersion = "17.5.0"
	postgresMajor   = "17"
	mavenCentral    = "https://repo1.maven.org/maven2"
	artifactPath    = "/io/zonky/test/postgres/embedded-postgres-binaries-%[1]s/%[2]s/" +
		"embedded-postgres-binaries-%[1]s-%[2]s.jar"
	artifactLimit   = 64 << 20
	downloadTimeout = 5 * time.Minute
)

// RepositoryVariable names the environment variable that replaces Maven Central by another repository, such as a
// company's proxy.
const RepositoryVariable = "WHARF_MAVEN_REPOSITORY"

// artifacts are the SHA-256 sums of the artifacts per platform, so that it does not matter who serves them.
var artifacts = map[string]string{
	"linux-amd64":        "646f3269075d1a23904127374e3cdbcef96beb32979fedee25d835877400fcbe",
	"linux-amd64-alpine": "7122386c7f7a089568f05720ada63448093d4065abbc0a89e6dc660851a53e3c",
	"linux-arm64v8":      "e02f27ff50ff2d90b6541d54f3f108505aacd84ea53c2890e976a684bfea2752",
	"darwin-amd64":       "fb70f783928e77c3d6ef5ca8ed644f1ac502f740fcfc032a375c8347820f2bdd",
	"darwin-arm64v8":     "e9d3398e10c2ec926395498b03e75ad1a24eeaed82895e756a7e173b202cf6de",
}

// platform is this machine's name among the artifacts.
func platform() string {
	p := runtime.GOOS + "-" + runtime.GOARCH
	if runtime.GOARCH == "arm64" {
		p += "v8"
	}
	if _, err := os.Stat("/etc/alpine-release"); err == nil {
		p += "-alpine" // another C library
	}
	return p
}

// binaries is the directory of the Postgres programs in the cache, which it downloads on first use.
func binaries(ctx context.Context, cache string, log *slog.Logger) (string, error) {
	sum, known := artifacts[platform()]
	if !known {
		return "", fmt.Errorf("there is no embedded Postgres for %s: run one and pass its --database-url", platform())
	}
	if err := openDir(cache); err != nil {
		return "", fmt.Errorf("find a place for the Postgres programs: %w", err)
	}
	dir := filepath.Join(cache, "postgres-"+postgresVersion+"-"+platform())
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}

	// One process downloads; others that start at the same time wait for it.
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	for err = flock(lock, syscall.LOCK_EX); err != nil; err = flock(lock, syscall.LOCK_EX) {
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return "", fmt.Errorf("wait for another process to download Postgres: %w", err)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}

	repository := strings.TrimSuffix(cmp.Or(os.Getenv(RepositoryVariable), mavenCentral), "/")
	url := repository + fmt.Sprintf(artifactPath, platform(), postgresVersion)
	log.Info("downloading Postgres, once", "version", postgresVersion, "from", url, "to", dir)
	jar, err := download(ctx, url)
	if err != nil {
		return "", fmt.Errorf("download Postgres (%s names another Maven repository): %w", RepositoryVariable, err)
	}
	if got := sha256.Sum256(jar); hex.EncodeToString(got[:]) != sum {
		return "", fmt.Errorf("download Postgres: what %s serves has the SHA-256 sum %x, want %s", url, got, sum)
	}

	// Unpacked aside and renamed, so that a directory of that name is always whole.
	aside, err := os.MkdirTemp(cache, "unpacking-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(aside)
	if err := unpack(jar, aside); err != nil {
		return "", fmt.Errorf("unpack Postgres: %w", err)
	}
	if err := errors.Join(os.Chmod(aside, 0o755), os.Rename(aside, dir)); err != nil {
		return "", err
	}
	return dir, nil
}

func download(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, downloadTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}
	defer client.CloseIdleConnections() // it will not be needed again
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, artifactLimit))
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", url, err)
	}
	return body, nil
}

// unpack writes the files of the .txz archive inside the jar to the directory.
func unpack(jar []byte, dir string) error {
	archive, err := zip.NewReader(bytes.NewReader(jar), int64(len(jar)))
	if err != nil {
		return err
	}
	names, err := fs.Glob(archive, "*.txz")
	if err != nil || len(names) != 1 {
		return fmt.Errorf("the jar holds %d archives, want 1", len(names))
	}
	packed, err := archive.Open(names[0])
	if err != nil {
		return err
	}
	defer packed.Close()
	plain, err := xz.NewReader(packed, 0)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir) // nothing gets out of it, whatever names the archive has
	if err != nil {
		return err
	}
	defer root.Close()
	files := tar.NewReader(plain)
	for {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := unpackOne(root, h, files); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func unpackOne(root *os.Root, h *tar.Header, content io.Reader) error {
	name := filepath.Clean(h.Name)
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.Chmod(filepath.Dir(name), 0o755); err != nil { // whatever the umask
		return err
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, h.FileInfo().Mode().Perm())
		if err != nil {
			return err
		}
		_, err = io.Copy(f, content)
		return errors.Join(err, f.Chmod(h.FileInfo().Mode().Perm()), f.Sync(), f.Close())
	}
	return nil // directories are made for the files in them
}

// cacheDir is where the user's downloads are kept; root's are where the account that runs the server can reach them.
func cacheDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/cache/wharf", nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "wharf"), err
}

// openDir makes a directory that everybody may enter, whatever the umask.
func openDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	return errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o755))
}

// pause waits, or returns ctx's error.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
