{{- define "loraplex.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "loraplex.name" .) .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (include "loraplex.name" .) | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "loraplex.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "loraplex.selector" -}}
app.kubernetes.io/name: {{ include "loraplex.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: loraplex
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- /* An image by digest when it has one, else by tag, else by the version of this chart. */ -}}
{{- define "loraplex.image" -}}
{{- if .image.digest }}{{ printf "%s@%s" .image.repository .image.digest }}
{{- else }}{{ printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) }}{{ end }}
{{- end }}

{{- /* Longer than preStop and drain, with ten seconds to spare: else the kubelet kills what is still answering. */ -}}
{{- define "loraplex.grace" -}}
{{- $least := add .c.preStopSeconds .c.drainSeconds 10 }}
{{- if le (int .c.terminationGracePeriodSeconds) (int $least) }}
{{- fail (printf "%s: terminationGracePeriodSeconds is %d; it must exceed preStopSeconds + drainSeconds + 10 = %d" .what (int .c.terminationGracePeriodSeconds) (int $least)) }}
{{- end }}
terminationGracePeriodSeconds: {{ .c.terminationGracePeriodSeconds }}
{{- end }}

{{- define "loraplex.podMetadata" -}}
labels:
  {{- include "loraplex.labels" . | nindent 2 }}
  {{- with .pool }}
  loraplex/pool: {{ . }}
  {{- end }}
  {{- with .root.Values.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  checksum/config: {{ .config | sha256sum }}
  {{- with .root.Values.podAnnotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- define "loraplex.podSpec" -}}
serviceAccountName: {{ include "loraplex.fullname" .root }}-{{ .component }}
automountServiceAccountToken: false
# A Service's name would become LORAPLEX_... variables, which are options.
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.runAs.user }}
  runAsGroup: {{ .root.Values.runAs.group }}
  fsGroup: {{ .root.Values.runAs.group }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .scheduling }}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "loraplex.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "loraplex.selector" . | nindent 8 }}
    {{- if .hash }}
    matchLabelKeys: [pod-template-hash]
    {{- end }}
{{- end }}

{{- define "loraplex.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "loraplex.probes" -}}
startupProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 5
  failureThreshold: {{ div (add .startupSeconds 4) 5 }}
livenessProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: {{ .port }}, service: readiness}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- if .preStopSeconds }}
lifecycle:
  preStop:
    sleep: {seconds: {{ .preStopSeconds }}}
{{- end }}
{{- end }}

{{- define "loraplex.commonConfig" -}}
LORAPLEX_HOST: "0.0.0.0"
LORAPLEX_LOG_LEVEL: {{ .root.Values.logLevel | quote }}
LORAPLEX_DRAIN_SECONDS: {{ .c.drainSeconds | quote }}
{{- range $name, $value := .c.options }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{- /* The Secret that services show each other, and the one that the gateway shows its clients; empty: no TLS there. */ -}}
{{- define "loraplex.tlsSecret" -}}
{{- with .Values.tls }}{{ if .secret }}{{ .secret }}{{ else if .issuer.name }}{{ include "loraplex.fullname" $ }}-tls{{ end }}{{ end }}
{{- end }}

{{- /* Of one component: with roles each has a Secret of its own. */ -}}
{{- define "loraplex.tlsSecretOf" -}}
{{- with include "loraplex.tlsSecret" .root }}{{ . }}{{ if $.root.Values.tls.roles }}-{{ $.component }}{{ end }}{{ end }}
{{- end }}

{{- define "loraplex.gatewaySecret" -}}
{{- with .Values.gateway.tls }}{{ if .secret }}{{ .secret }}{{ else if .issuer.name }}{{ include "loraplex.fullname" $ }}-gateway-tls{{ end }}{{ end }}
{{- end }}

{{- /* Options of a service inside; its health port is the only one that a kubelet can ask then. */ -}}
{{- define "loraplex.tlsConfig" -}}
{{- if include "loraplex.tlsSecret" .root }}
LORAPLEX_TLS_CERT: /tls/tls.crt
LORAPLEX_TLS_KEY: /tls/tls.key
LORAPLEX_TLS_CA: /tls/ca.crt
LORAPLEX_TLS_REQUIRE_CLIENT: {{ .root.Values.tls.mutual | quote }}
{{- if .root.Values.tls.roles }}
{{- if not .root.Values.tls.mutual }}{{ fail "tls.roles needs tls.mutual: a caller without a certificate has no role" }}{{ end }}
LORAPLEX_TLS_ROLES: "true"
{{- end }}
LORAPLEX_HEALTH_PORT: {{ .healthPort | quote }}
{{- end }}
{{- end }}

{{- define "loraplex.tlsMounts" -}}
{{- if include "loraplex.tlsSecret" . }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "loraplex.tlsVolumes" -}}
{{- with include "loraplex.tlsSecretOf" . }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- /* Clear text HTTP/2 is what the port speaks without TLS. */ -}}
{{- define "loraplex.appProtocol" -}}
{{- if not .secret }}, appProtocol: kubernetes.io/h2c{{ end }}
{{- end }}

{{- define "loraplex.redisEnabled" -}}
{{- if or .Values.redis.bundled.enabled .Values.redis.external.url }}true{{ end }}
{{- end }}

{{- define "loraplex.redisSecret" -}}
{{- if .Values.redis.bundled.enabled }}{{ default (printf "%s-redis" (include "loraplex.fullname" .)) .Values.redis.bundled.existingSecret }}
{{- else }}{{ .Values.redis.external.passwordSecret }}{{ end }}
{{- end }}

{{- /* The pools, each over the defaults, as YAML. */ -}}
{{- define "loraplex.pools" -}}
{{- $names := dict }}
{{- range .Values.pools }}
{{- if hasKey $names .name }}{{ fail (printf "pools: two pools are called %s" .name) }}{{ end }}
{{- $_ := set $names .name true }}
{{- $pool := mergeOverwrite (deepCopy $.Values.poolDefaults) (deepCopy .) }}
{{- if and $pool.model.existingClaim $pool.model.download.url }}
{{- fail (printf "pool %s: model.existingClaim and model.download.url are two sources of one model" .name) }}
{{- end }}
{{- if and $pool.model.download.url (not $pool.model.download.sha256) }}
{{- fail (printf "pool %s: model.download.url needs model.download.sha256" .name) }}
{{- end }}
{{- if and (eq $pool.device "cuda") (lt (int $pool.gpu.count) 1) }}
{{- fail (printf "pool %s: device cuda needs gpu.count of at least 1" .name) }}
{{- end }}
{{- if and $pool.autoscaling.enabled (not $pool.autoscaling.prometheus) }}
{{- fail (printf "pool %s: autoscaling needs autoscaling.prometheus, where the queue is asked for" .name) }}
{{- end }}
{{- if and $pool.autoscaling.enabled (gt (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas)) }}
{{- fail (printf "pool %s: autoscaling.minReplicas exceeds maxReplicas" .name) }}
{{- end }}
- {{ toYaml $pool | nindent 2 | trim }}
{{ end }}
{{- end }}

{{- /* Options of a service that uses Redis. */ -}}
{{- define "loraplex.redisConfig" -}}
{{- with .Values.redis }}
{{- if .bundled.enabled }}
LORAPLEX_REDIS: "redis://{{ include "loraplex.fullname" $ }}-redis:6379/0"
LORAPLEX_REDIS_USERNAME: loraplex
LORAPLEX_REDIS_PASSWORD_FILE: /redis/password
{{- else if .external.url }}
LORAPLEX_REDIS: {{ .external.url | quote }}
{{- with .external.username }}
LORAPLEX_REDIS_USERNAME: {{ . | quote }}
{{- end }}
{{- if .external.passwordSecret }}
LORAPLEX_REDIS_PASSWORD_FILE: /redis/{{ .external.passwordKey }}
{{- end }}
{{- if .external.tlsSecret }}
LORAPLEX_REDIS_TLS_CA: /redis-tls/ca.crt
LORAPLEX_REDIS_TLS_CERT: /redis-tls/tls.crt
LORAPLEX_REDIS_TLS_KEY: /redis-tls/tls.key
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "loraplex.redisMounts" -}}
{{- if include "loraplex.redisEnabled" . }}
{{- if include "loraplex.redisSecret" . }}
- {name: redis, mountPath: /redis, readOnly: true}
{{- end }}
{{- if .Values.redis.external.tlsSecret }}
- {name: redis-tls, mountPath: /redis-tls, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "loraplex.redisVolumes" -}}
{{- if include "loraplex.redisEnabled" . }}
{{- if include "loraplex.redisSecret" . }}
- name: redis
  secret: {secretName: {{ include "loraplex.redisSecret" . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.redis.external.tlsSecret }}
- name: redis-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}
