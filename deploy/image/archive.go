package main

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// writeArchive writes an OCI image layout as a tar, which containerd, podman,
// skopeo, crane and Docker's containerd image store read. For Docker's older
// store, manifest.json names the first architecture's parts, as `docker save`
// writes it; readers of the layout ignore it.
func writeArchive(path string, tag name.Tag, index v1.ImageIndex, images []built) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making the folder for %s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".image-*") // never a half archive under its name
	if err != nil {
		return fmt.Errorf("creating %s: %w", path, err)
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := writeLayout(f, tag, index, images); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := f.Chmod(0o644); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// dockerManifest is an entry of Docker's manifest.json.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func writeLayout(out io.Writer, tag name.Tag, index v1.ImageIndex, images []built) error {
	top := mutate.IndexMediaType(mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
		Add: index,
		Descriptor: v1.Descriptor{Annotations: map[string]string{
			// The first is containerd's and a full name, the second the
			// specification's and the tag alone.
			"io.containerd.image.name":          fullName(tag),
			"org.opencontainers.image.ref.name": tag.TagStr(),
		}},
	}), types.OCIImageIndex)
	topJSON, err := top.RawManifest()
	if err != nil {
		return err
	}
	indexJSON, err := index.RawManifest()
	if err != nil {
		return err
	}
	indexDigest, err := index.Digest()
	if err != nil {
		return err
	}

	a := &archive{tar: tar.NewWriter(out), written: make(map[string]bool)}
	a.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	a.file("index.json", topJSON)
	a.dir("blobs/")
	a.dir("blobs/sha256/")
	a.file(blob(indexDigest), indexJSON)
	var docker []dockerManifest
	for _, b := range images {
		entry, err := a.image(b)
		if err != nil {
			return err
		}
		if docker == nil {
			entry.RepoTags = []string{strings.TrimPrefix(strings.TrimPrefix(fullName(tag), "docker.io/"), "library/")}
			docker = append(docker, entry)
		}
	}
	dockerJSON, err := json.Marshal(docker)
	if err != nil {
		return err
	}
	a.file("manifest.json", dockerJSON)
	if a.err != nil {
		return a.err
	}
	return a.tar.Close()
}

// archive writes files of a layout; the first error stays in err.
type archive struct {
	tar     *tar.Writer
	written map[string]bool
	err     error
}

func (a *archive) dir(path string) {
	if a.err == nil {
		a.err = a.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: path, Mode: 0o755, Format: tar.FormatUSTAR})
	}
}

func (a *archive) file(path string, data []byte) {
	if a.err != nil || a.written[path] {
		return
	}
	a.written[path] = true
	a.err = a.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644, Size: int64(len(data)), Format: tar.FormatUSTAR})
	if a.err == nil {
		_, a.err = a.tar.Write(data)
	}
}

// image writes the blobs of one architecture.
func (a *archive) image(b built) (entry dockerManifest, err error) {
	manifest, err := b.image.RawManifest()
	if err != nil {
		return entry, err
	}
	config, err := b.image.RawConfigFile()
	if err != nil {
		return entry, err
	}
	configDigest, err := b.image.ConfigName()
	if err != nil {
		return entry, err
	}
	a.file(blob(b.digest), manifest)
	a.file(blob(configDigest), config)
	entry.Config = blob(configDigest)
	layers, err := b.image.Layers()
	if err != nil {
		return entry, err
	}
	for _, layer := range layers {
		digest, err := layer.Digest()
		if err != nil {
			return entry, err
		}
		r, err := layer.Compressed()
		if err != nil {
			return entry, err
		}
		data, err := io.ReadAll(r) // at most maxCompressed
		r.Close()
		if err != nil {
			return entry, err
		}
		a.file(blob(digest), data)
		entry.Layers = append(entry.Layers, blob(digest))
	}
	return entry, nil
}

func blob(digest v1.Hash) string {
	return "blobs/" + digest.Algorithm + "/" + digest.Hex
}

// fullName is the name by which containerd and the kubelet know the image.
func fullName(tag name.Tag) string {
	return strings.Replace(tag.Name(), name.DefaultRegistry, "docker.io", 1)
}
