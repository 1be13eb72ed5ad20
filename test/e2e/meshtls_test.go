//go:build e2e

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	numbers "math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// keyPair is a certificate for a name, and its key, in PEM.
func keyPair(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: numbers.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 1), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
}

func tlsSecret(name string, certificate, key []byte) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: shop}\ntype: kubernetes.io/tls\ndata: {tls.crt: %s, tls.key: %s}\n",
		name, base64.StdEncoding.EncodeToString(certificate), base64.StdEncoding.EncodeToString(key))
}

const vaultManifest = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: vault, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: vault}}
  template:
    metadata: {labels: {app: vault}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
      volumes: [{name: tls, secret: {secretName: vault-tls}}]
      containers:
      - name: app
        image: testapp.local/testapp:1
        args: [serve, --certificates, /tls]
        volumeMounts: [{name: tls, mountPath: /tls}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: vault, namespace: shop}
spec: {selector: {app: vault}, ports: [{name: https, port: 443, targetPort: 8443}]}
`

// TestMeshTLS: with the Service's key gates see into TLS. Clients see the certificate
// that they know, the origin is asked by TLS, and the key is in no object and no file.
func TestMeshTLS(t *testing.T) {
	unchangedShop(t)
	certificate, key := keyPair(t, "vault.shop")
	otherCertificate, otherKey := keyPair(t, "vault.shop")
	apply(t, tlsSecret("vault-tls", certificate, key)+tlsSecret("vault-other", otherCertificate, otherKey)+"---"+vaultManifest)
	kubectl(t, "-n", "shop", "rollout", "status", "deployment/vault", "--timeout=60s")
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	ca := filepath.Join(alice.Home(alice.user), "vault.pem")
	if err := os.WriteFile(ca, certificate, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(ca) })
	secure := func(name string, within time.Duration, flags ...string) {
		t.Helper()
		eventually(t, within, func() error {
			r := alice.Run(alice.user, "curl", append([]string{"-sS", "--max-time", "10", "--cacert", ca, "https://vault.shop/who"}, flags...)...)
			if who, _, _ := strings.Cut(strings.TrimSpace(r.Stdout), " "); r.Code != 0 || !serves(who, name) {
				return fmt.Errorf("curl %v: %v, not %s", flags, r, name)
			}
			return nil
		})
	}
	secure("vault-*", 5*time.Second, "-H", "VERSION: alice")
	before := shopOfOthers(t)
	mesh := []string{"mesh", "vault", "--expose", "8443:443", "--version-mark", "alice"}
	for _, c := range []struct {
		flags []string
		says  string
	}{
		{nil, "--tls-secret"},
		{[]string{"--tls-secret", "vault-none"}, "vault-none"},
		{[]string{"--tls-secret", "cart"}, "kubernetes.io/tls"},
		{[]string{"--tls-secret", "vault-other"}, "certificate"},
	} {
		if r := alice.culvert(append(mesh, c.flags...)...); r.Code != 1 && r.Code != 2 || !strings.Contains(r.Stderr, c.says) {
			t.Errorf("mesh %v: %v", c.flags, r)
		}
	}
	sameLines(t, before, 20*time.Second, func() []string { return shopOfOthers(t) })

	alice.intercept(t, append(mesh, "--tls-secret", "vault-tls")...)
	for _, version := range []string{"--http1.1", "--http2"} {
		secure("alice", 3*time.Second, version, "-H", "VERSION: alice")
		secure("vault-*", time.Second, version)
	}
	for _, line := range listNamespace(t, "shop") {
		if strings.Contains(line, base64.StdEncoding.EncodeToString(key)[:64]) && !strings.HasPrefix(line, "Secret/") || strings.Contains(line, "PRIVATE KEY") {
			t.Errorf("the key is in %.200s", line)
		}
	}
	t.Run("new gates", func(t *testing.T) {
		kubectl(t, "-n", "shop", "delete", "pod", "-l", "app.kubernetes.io/name=culvert-gate", "--wait=false")
		secure("vault-*", 10*time.Second)
		time.Sleep(5 * time.Second) // those of before are gone
		secure("alice", 10*time.Second, "-H", "VERSION: alice")
	})
	alice.leave(t, "vault")
	secure("vault-*", 2*time.Second, "-H", "VERSION: alice")
	sameLines(t, before, 20*time.Second, func() []string { return shopOfOthers(t) })
}
