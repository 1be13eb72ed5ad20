package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"embed"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// user is numeric, so that Kubernetes can check runAsNonRoot without reading
// the image's /etc/passwd. OpenShift replaces it by a user of its own.
const user = "65532:65532"

const source = "https://github.com/culvert-dev/culvert"

// maxCompressed bounds what a node pulls, in bytes: a developer waits for it at
// the first connect.
const maxCompressed = 12_000_000

// machines are the architectures and what their binaries say they are.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// etc has the user and its group by name, for tools that list processes. The
// Dockerfile copies the same files.
//
//go:embed etc/passwd etc/group
var etc embed.FS

// agentBinary is the agent for one architecture.
type agentBinary struct {
	arch string // of machines
	path string
}

// built is a finished image of one architecture.
type built struct {
	arch       string
	image      v1.Image
	digest     v1.Hash
	compressed int64 // all layers, bytes
}

// labels are the image's, see the OCI image spec's pre-defined annotation keys.
func labels(version, licence string) map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "culvert-agent",
		"org.opencontainers.image.description": "Culvert's agent: the unprivileged cluster end of a developer's tunnel",
		"org.opencontainers.image.source":      source,
		"org.opencontainers.image.version":     version,
		"org.opencontainers.image.licenses":    licence,
	}
}

// buildImage makes the image of one binary. The same binary and labels make the
// same digest: every time in it is created.
func buildImage(b agentBinary, labels map[string]string, created time.Time) (built, error) {
	program, err := os.ReadFile(b.path)
	if err != nil {
		return built{}, fmt.Errorf("reading the %s binary: %w", b.arch, err)
	}
	if err := checkBinary(program, b.arch); err != nil {
		return built{}, fmt.Errorf("%s: %w", b.path, err)
	}
	files, err := rootFS(program, created)
	if err != nil {
		return built{}, fmt.Errorf("packing the %s layer: %w", b.arch, err)
	}
	layer, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithCompressionLevel(gzip.BestCompression), tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return built{}, fmt.Errorf("compressing the %s layer: %w", b.arch, err)
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.ConfigFile(base, &v1.ConfigFile{
		OS: "linux", Architecture: b.arch,
		Created: v1.Time{Time: created},
		RootFS:  v1.RootFS{Type: "layers"},
		Config: v1.Config{
			User:       user,
			Entrypoint: []string{"/culvert-agent"},
			WorkingDir: "/",
			Labels:     labels,
		},
	})
	if err != nil {
		return built{}, fmt.Errorf("writing the %s configuration: %w", b.arch, err)
	}
	image, err = mutate.Append(image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "deploy/image"},
	})
	if err != nil {
		return built{}, fmt.Errorf("adding the %s layer: %w", b.arch, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return built{}, fmt.Errorf("computing the %s digest: %w", b.arch, err)
	}
	size, err := layer.Size()
	if err != nil {
		return built{}, fmt.Errorf("measuring the %s layer: %w", b.arch, err)
	}
	if size > maxCompressed {
		return built{}, fmt.Errorf("%s: %d bytes compressed, more than the %d allowed; build with -trimpath -ldflags \"-s -w\"", b.path, size, maxCompressed)
	}
	return built{b.arch, image, digest, size}, nil
}

// buildIndex joins images to one image for several architectures.
func buildIndex(images []built, labels map[string]string) v1.ImageIndex {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, b := range images {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        b.image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: b.arch}},
		})
	}
	return mutate.Annotations(index, labels).(v1.ImageIndex)
}

// checkBinary tells whether the program would start in an image that has
// nothing else in it.
func checkBinary(program []byte, arch string) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return fmt.Errorf("not a Linux program: %w", err)
	}
	defer f.Close()
	if f.Machine != machines[arch] {
		return fmt.Errorf("built for %s, not for %s; build with GOARCH=%s", f.Machine, arch, arch)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("needs a dynamic loader; build with CGO_ENABLED=0")
		}
	}
	return nil
}

// rootFS is the layer's tar: the agent, and its user and group by name.
func rootFS(program []byte, modified time.Time) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(path string, mode int64, data []byte) error {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode, Size: int64(len(data)), ModTime: modified, Format: tar.FormatUSTAR}
		if data == nil {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	if err := add("etc/", 0o755, nil); err != nil {
		return nil, err
	}
	for _, path := range []string{"etc/group", "etc/passwd"} {
		data, err := etc.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := add(path, 0o644, data); err != nil {
			return nil, err
		}
	}
	if err := add("culvert-agent", 0o755, program); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// parseTag reads NAME:TAG. Without a registry, it is Docker Hub's, as for the
// kubelet.
func parseTag(text string) (name.Tag, error) {
	tag, err := name.NewTag(text)
	if err != nil {
		return tag, fmt.Errorf("reading the image name %q: %w", text, err)
	}
	return tag, nil
}
