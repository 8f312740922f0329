package apache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
)

const (
	version = "4.3.1"
	minJava = 17
)

// ErrMissing says that Java or Maven is not installed.
var ErrMissing = errors.New("something is not installed")

// pom names the broker, and a logger for it.
const pom = `<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>wharf</groupId>
  <artifactId>apache-kafka</artifactId>
  <version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>` + version + `</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
`

// java is the path of a Java that can run the broker.
func java(ctx context.Context) (string, error) {
	install := fmt.Sprintf("install Java %d or newer, such as the package openjdk-%[1]d-jre-headless", minJava)
	path, err := exec.LookPath("java")
	if err != nil {
		return "", fmt.Errorf("%w: %w: %s", ErrMissing, err, install)
	}
	out, err := exec.CommandContext(ctx, path, "-version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w: %s", path, err, tail(out))
	}
	found := regexp.MustCompile(`version "(\d+)`).FindSubmatch(out)
	if found == nil {
		return "", fmt.Errorf("ask %s for its version: it says %s", path, tail(out))
	}
	if n, err := strconv.Atoi(string(found[1])); err != nil || n < minJava {
		return "", fmt.Errorf("%w: %s is Java %s: %s", ErrMissing, path, found[1], install)
	}
	return path, nil
}

// jars is the directory of the broker's jars in the user's cache, to which Maven downloads them on first use.
func jars(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "wharf")
	dir := filepath.Join(cache, "apache-kafka-"+version)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	mvn, err := exec.LookPath("mvn")
	if err != nil {
		return "", fmt.Errorf("%w: %w: install Maven, such as the package maven, which downloads Apache Kafka", ErrMissing, err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	// Made aside and renamed, so that a directory of that name is always whole.
	aside, err := os.MkdirTemp(cache, "downloading-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(aside)
	if err := os.WriteFile(filepath.Join(aside, "pom.xml"), []byte(pom), 0o644); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, mvn, "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib")
	cmd.Dir = aside
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("download Apache Kafka: %w: %s", err, tail(out))
	}
	if err := os.Rename(filepath.Join(aside, "lib"), dir); err != nil {
		if _, there := os.Stat(dir); there != nil { // not by another process, at the same time
			return "", err
		}
	}
	return dir, nil
}
